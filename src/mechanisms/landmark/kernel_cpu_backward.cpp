#include <cmath>

#include "mechanisms/landmark/kernel_cpu_backward.h"

namespace everlong::landmark {
namespace {

// Tiles whose per-section numbers are kept at a time: with many, keys are packed less often.
constexpr std::int64_t kTogether = 16;

// The gradients of one key head of one row of the batch, sections over groups of tiles. Per tile
// and section a row needs two numbers: the log-sum-exp that makes exp(score - it) its weight, and
// what is taken from the slope (README.md, section 2).
struct HeadScratch {
  TileSections sections;
  float *grad_k, *grad_v;           // [S][padded dim]
  float *lse, *base;                // [kTogether][sections][kTileRows]
  float* grad_q;                    // [kTogether][kTileRows][padded dim]
  float *along, *total, *slope;     // [kTileRows]: D, L, D_b
  float *gate_slopes, *gate_grads;  // [kPanel][kTileRows], [kPanel][kKeyStride]
  float* queries;                   // [kTileRows][kKeyStride]
  float *block_k, *block_v;         // [kTileKeys][padded dim]
  std::byte* block;

  HeadScratch(const Plan& plan, std::int64_t most_sections, Arena& arena)
      : sections(plan, arena),
        grad_k(arena.floats(plan.S * TileSections::padded(plan.key_dim()))),
        grad_v(arena.floats(plan.S * TileSections::padded(plan.value_dim()))),
        lse(arena.floats(kTogether * most_sections * kTileRows)),
        base(arena.floats(kTogether * most_sections * kTileRows)),
        grad_q(arena.floats(kTogether * kTileRows * TileSections::padded(plan.key_dim()))),
        along(arena.floats(kTileRows)),
        total(arena.floats(kTileRows)),
        slope(arena.floats(kTileRows)),
        gate_slopes(arena.floats(kPanel * kTileRows)),
        gate_grads(arena.floats(kPanel * kKeyStride)),
        queries(arena.floats(kTileRows * kKeyStride)),
        block_k(arena.floats(cpu::kTileKeys * TileSections::padded(plan.key_dim()))),
        block_v(arena.floats(cpu::kTileKeys * TileSections::padded(plan.value_dim()))),
        block(arena.bytes(cpu::SoftmaxBackward::scratch_bytes(plan.key_dim(), plan.value_dim()))) {}
};

void add_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t dim,
              float factor, float* to, std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < dim; ++c)
      to[r * to_stride + c] += factor * from[r * from_stride + c];
}

class HeadBackward {
 public:
  HeadBackward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
               std::int64_t most_sections, Arena& arena)
      : plan_(plan),
        grads_(grads),
        b_(b),
        head_(head),
        most_(most_sections),
        key_stride_(TileSections::padded(plan.key_dim())),
        value_stride_(TileSections::padded(plan.value_dim())),
        s_(plan, most_sections, arena) {}

  void run() {
    std::fill_n(s_.grad_k, plan_.S * key_stride_, 0.0F);
    std::fill_n(s_.grad_v, plan_.S * value_stride_, 0.0F);
    const std::int64_t all = plan_.folds * plan_.tiles();
    for (std::int64_t first = 0; first < all; first += kTogether) {
      const std::int64_t count = std::min(kTogether, all - first);
      std::fill_n(s_.grad_q, kTogether * kTileRows * key_stride_, 0.0F);
      for (std::int64_t i = 0; i < count; ++i) look(tile(first + i), i);
      add_sections(first, count);
      for (std::int64_t i = 0; i < count; ++i) {
        const Tile t = tile(first + i);
        cpu::softmax_write_grad_q(grad_q(i), plan_.shape(), static_cast<int>(t.rows),
                                  tile_rows(grads_.grad_q, t));
      }
    }
    write_keys(grads_.grad_k, s_.grad_k, key_stride_, plan_.key_dim());
    write_keys(grads_.grad_v, s_.grad_v, value_stride_, plan_.value_dim());
  }

 private:
  Tile tile(std::int64_t index) const {
    return Tile(plan_, b_, index % plan_.tiles(), head_ * plan_.folds + index / plan_.tiles());
  }
  float* grad_q(std::int64_t i) const { return s_.grad_q + i * kTileRows * key_stride_; }
  float* number(float* numbers, std::int64_t i, std::int64_t section) const {
    return numbers + (i * most_ + section) * kTileRows;
  }

  // Fills the numbers of tile i and adds what flows through gates.
  void look(const Tile& t, std::int64_t i) {
    const auto sections = plan_.sections(b_);
    const int rows = static_cast<int>(t.rows), dim = plan_.key_dim();
    const Rows go = tile_rows(grads_.grad_o, t);
    cpu::softmax_delta(tile_rows(grads_.o, t), go, rows, plan_.value_dim(),
                       {s_.along, DType::kFloat32, 1, 0, 1});
    const Rows lse = tile_rows(transposed(grads_.lse), t);
    for (std::int64_t r = 0; r < t.rows; ++r)
      s_.total[r] = static_cast<const float*>(lse.data)[lse.at(r)];
    if (grads_.grad_lse) {
      const Rows grad = tile_rows(transposed(grads_.grad_lse), t);
      for (std::int64_t r = 0; r < t.rows; ++r)
        s_.along[r] -= static_cast<const float*>(grad.data)[grad.at(r)];
    }
    copy_queries(tile_rows(plan_.call.q, t), rows, dim, s_.queries);
    std::int64_t panel_first = 0, panel_count = 0;
    const auto flush = [&] {
      if (panel_count == 0) return;
      std::fill_n(s_.gate_grads, kPanel * kKeyStride, 0.0F);
      gate_gradients(s_.gate_slopes, panel_count, s_.sections.landmarks(), s_.queries, rows, dim,
                     grad_q(i), key_stride_, s_.gate_grads);
      for (std::int64_t j = 0; j < panel_count; ++j) {
        const Section& section = sections[static_cast<std::size_t>(panel_first + j)];
        if (section.closed)
          add_rows(s_.gate_grads + j * kKeyStride, 0, 1, dim, static_cast<float>(plan_.call.scale),
                   s_.grad_k + section.end * key_stride_, 0);
      }
    };
    std::int64_t done = 0;
    s_.sections.walk(
        t,
        [&](std::int64_t first, std::int64_t count) {
          panel_first = first;
          panel_count = count;
          done = 0;
          std::fill_n(s_.gate_slopes, kPanel * kTileRows, 0.0F);
        },
        [&](std::int64_t at, const float* score, const float* inner, const float* values) {
          weigh(t, i, at, score, inner, values);
          if (++done == panel_count) flush();
        });
  }

  void weigh(const Tile& t, std::int64_t i, std::int64_t at, const float* score, const float* inner,
             const float* values) {
    constexpr float kBlind = -std::numeric_limits<float>::infinity();
    const Section& section = plan_.sections(b_)[static_cast<std::size_t>(at)];
    float *lse = number(s_.lse, i, at), *base = number(s_.base, i, at),
          *gate = s_.gate_slopes + (at % kPanel) * kTileRows;
    section_slopes(values, s_.sections.stride(), tile_rows(grads_.grad_o, t),
                   static_cast<int>(t.rows), plan_.value_dim(), s_.slope);
    for (std::int64_t r = 0; r < t.rows; ++r) {
      if (!is_past(section, t.position(r))) {
        lse[r] = s_.total[r];
        base[r] = s_.along[r];
        continue;
      }
      const float inside = inner[r] == kBlind ? 0 : s_.slope[r];
      const float weight =
          score[r] == kBlind || s_.total[r] == kBlind ? 0 : std::exp(score[r] - s_.total[r]);
      gate[r] = weight * (inside - s_.along[r]);
      lse[r] = weight == 0 || inner[r] == kBlind ? kBlind : s_.total[r] - score[r] + inner[r];
      base[r] = inside;
    }
  }

  // Every section, in pieces that the block holds, against the tiles that see it.
  void add_sections(std::int64_t first, std::int64_t count) {
    const auto sections = plan_.sections(b_);
    cpu::SoftmaxBackward block(plan_.shape(), s_.block);
    SectionSight sight;
    for (std::size_t at = 0; at < sections.size(); ++at)
      for (std::int64_t key = sections[at].begin; key < sections[at].end; key += cpu::kTileKeys) {
        const std::int64_t keys = std::min<std::int64_t>(cpu::kTileKeys, sections[at].end - key);
        bool begun = false;
        for (std::int64_t i = 0; i < count; ++i) {
          const Tile t = tile(first + i);
          if (t.last < key) continue;
          if (!begun)
            block.begin({key_rows(plan_.call.k, b_, key, head_),
                         key_rows(plan_.call.v, b_, key, head_), keys, nullptr});
          begun = true;
          sight.set(t, key);
          const auto of = [&](float* numbers) -> Rows {
            return {number(numbers, i, static_cast<std::int64_t>(at)), DType::kFloat32, 1, 0, 1};
          };
          block.absorb({tile_rows(plan_.call.q, t), tile_rows(grads_.grad_o, t), of(s_.lse),
                        of(s_.base), static_cast<int>(t.rows)},
                       sight.view(), grad_q(i));
        }
        if (!begun) continue;
        block.finish({s_.block_k, DType::kFloat32, key_stride_, 0, 1},
                     {s_.block_v, DType::kFloat32, value_stride_, 0, 1});
        add_rows(s_.block_k, key_stride_, keys, plan_.key_dim(), 1, s_.grad_k + key * key_stride_,
                 key_stride_);
        add_rows(s_.block_v, value_stride_, keys, plan_.value_dim(), 1,
                 s_.grad_v + key * value_stride_, value_stride_);
      }
  }

  void write_keys(const TensorView& to, const float* from, std::int64_t stride, int dim) const {
    const MutableRows rows = rows_of(to, static_cast<std::byte*>(to.data), b_, 0, head_, 1);
    store_rows(from, stride, static_cast<int>(plan_.S), dim, rows);
  }

  const Plan& plan_;
  const KernelGrads& grads_;
  std::int64_t b_, head_, most_, key_stride_, value_stride_;
  HeadScratch s_;
};

}  // namespace

std::int64_t plain_backward_bytes(const Plan& plan, std::int64_t most_sections) {
  Arena arena(nullptr);
  const HeadScratch measured(plan, most_sections, arena);
  return arena.used();
}

void plain_backward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
                    std::int64_t most_sections, Arena& arena) {
  HeadBackward(plan, grads, b, head, most_sections, arena).run();
}

std::int64_t backward_workspace_bytes(const KernelCall& call, int threads) {
  const Plan plan(call);
  const std::int64_t most = plan.most_sections();
  return threads *
         (fits_fused(plan) ? fused_backward_bytes(plan, most) : plain_backward_bytes(plan, most));
}

Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  const std::int64_t all = backward_workspace_bytes(call, executor.threads());
  EVERLONG_RETURN_IF_ERROR(check_workspace(workspace, all));
  const Plan plan(call);
  const std::int64_t most = plan.most_sections(), bytes = all / executor.threads();
  const auto run = fits_fused(plan) ? fused_backward : plain_backward;
  spread(executor, plan.B * plan.G, [&](std::int64_t unit, int thread) {
    Arena arena(workspace.data() + thread * bytes);
    run(plan, grads, unit / plan.G, unit % plan.G, most, arena);
  });
  return {};
}

}  // namespace everlong::landmark
