#include "mechanisms/landmark/kernel_cpu_backward.h"

namespace everlong::landmark {
namespace {

// Tiles that meet a section one after the other while its keys are packed.
constexpr std::int64_t kTogether = 16;
constexpr std::int64_t kWholePanels = 12;  // panels of landmarks are read in blocks of so many

struct Scratch {
  std::int64_t most;                  // sections, in whole blocks
  float *grad_k, *grad_v;             // [S][padded dim]
  float *gates, *slopes;              // [kTogether][most][kTileRows]: scores in units of log 2, dz
  float* grad_q;                      // [kTogether][kTileRows][padded dim]
  float *along, *total;               // [kTogether][kTileRows]: D, L
  float* tiles;                       // [kTogether]: as FusedBackward loads them
  float *packed, *queries;            // [dim][kTileRows], [kTileRows][kKeyStride]
  float *landmarks, *landmark_grads;  // [kPanel][kKeyStride]
  FusedBackward block;

  Scratch(const Plan& plan, std::int64_t most_sections, Arena& arena)
      : most(parts(most_sections, kWholePanels) * kWholePanels),
        grad_k(arena.floats(plan.S * TileSections::padded(plan.key_dim()))),
        grad_v(arena.floats(plan.S * TileSections::padded(plan.value_dim()))),
        gates(arena.floats(kTogether * most * kTileRows)),
        slopes(arena.floats(kTogether * most * kTileRows)),
        grad_q(arena.floats(kTogether * kTileRows * TileSections::padded(plan.key_dim()))),
        along(arena.floats(kTogether * kTileRows)),
        total(arena.floats(kTogether * kTileRows)),
        tiles(arena.floats(kTogether * FusedBackward::kTileFloats)),
        packed(arena.floats(kTileRows * plan.key_dim())),
        queries(arena.floats(kTileRows * kKeyStride)),
        landmarks(arena.floats(kPanel * kKeyStride)),
        landmark_grads(arena.floats(kPanel * kKeyStride)),
        block(plan.shape(),
              arena.floats(FusedBackward::scratch_floats(plan.key_dim(), plan.value_dim()))) {}
};

class HeadBackward {
 public:
  HeadBackward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
               std::int64_t most_sections, Arena& arena)
      : plan_(plan),
        grads_(grads),
        b_(b),
        head_(head),
        key_stride_(TileSections::padded(plan.key_dim())),
        value_stride_(TileSections::padded(plan.value_dim())),
        sections_(plan.sections(b)),
        keys_(key_rows(plan.call.k, b, 0, head)),
        s_(plan, most_sections, arena) {}

  void run() {
    std::fill_n(s_.grad_k, plan_.S * key_stride_, 0.0F);
    std::fill_n(s_.grad_v, plan_.S * value_stride_, 0.0F);
    const std::int64_t all = plan_.folds * plan_.tiles();
    for (std::int64_t first = 0; first < all; first += kTogether) {
      const std::int64_t count = std::min(kTogether, all - first);
      std::fill_n(s_.grad_q, kTogether * kTileRows * key_stride_, 0.0F);
      std::fill_n(s_.slopes, kTogether * s_.most * kTileRows, 0.0F);
      for (std::int64_t i = 0; i < count; ++i) prepare(tile(first + i), i);
      for (std::size_t at = 0; at < sections_.size(); ++at) add_section(first, count, at);
      for (std::int64_t i = 0; i < count; ++i) {
        const Tile t = tile(first + i);
        add_gates(t, i);
        cpu::softmax_write_grad_q(s_.grad_q + i * kTileRows * key_stride_, plan_.shape(),
                                  static_cast<int>(t.rows), tile_rows(grads_.grad_q, t));
      }
    }
    write(grads_.grad_k, s_.grad_k, key_stride_, plan_.key_dim());
    write(grads_.grad_v, s_.grad_v, value_stride_, plan_.value_dim());
  }

 private:
  Tile tile(std::int64_t index) const {
    return Tile(plan_, b_, index % plan_.tiles(), head_ * plan_.folds + index / plan_.tiles());
  }
  float* of_section(float* numbers, std::int64_t i, std::int64_t section) const {
    return numbers + (i * s_.most + section) * kTileRows;
  }
  // Panels of the sections that a tile sees, their landmarks copied.
  template <class Panel>
  void panels(const Tile& t, const Panel& panel) const {
    const std::int64_t seen = t.seen(sections_);
    for (std::int64_t first = 0; first < seen; first += kPanel) {
      const std::int64_t count = std::min(kPanel, seen - first);
      copy_landmarks(
          keys_,
          sections_.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)),
          plan_.key_dim(), s_.landmarks);
      panel(first, count);
    }
  }

  void prepare(const Tile& t, std::int64_t i) {
    const int rows = static_cast<int>(t.rows);
    float *along = s_.along + i * kTileRows, *total = s_.total + i * kTileRows;
    cpu::softmax_delta(tile_rows(grads_.o, t), tile_rows(grads_.grad_o, t), rows, plan_.value_dim(),
                       {along, DType::kFloat32, 1, 0, 1});
    s_.block.load(tile_rows(plan_.call.q, t), tile_rows(grads_.grad_o, t), rows,
                  s_.tiles + i * FusedBackward::kTileFloats);
    const Rows lse = tile_rows(transposed(grads_.lse), t);
    for (std::int64_t r = 0; r < t.rows; ++r)
      total[r] = static_cast<const float*>(lse.data)[lse.at(r)];
    if (grads_.grad_lse) {
      const Rows grad = tile_rows(transposed(grads_.grad_lse), t);
      for (std::int64_t r = 0; r < t.rows; ++r)
        along[r] -= static_cast<const float*>(grad.data)[grad.at(r)];
    }
    pack_queries(tile_rows(plan_.call.q, t), rows, plan_.key_dim(),
                 static_cast<float>(plan_.call.scale) * kLog2e, s_.packed);
    panels(t, [&](std::int64_t first, std::int64_t count) {
      gate_scores(s_.landmarks, count, s_.packed, plan_.key_dim(), of_section(s_.gates, i, first));
    });
  }

  void add_section(std::int64_t first, std::int64_t count, std::size_t at) {
    const Section& section = sections_[at];
    bool begun = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const Tile t = tile(first + i);
      if (t.last < section.begin) continue;
      const auto index = static_cast<std::int64_t>(at);
      view_section(plan_, t, section, of_section(s_.gates, i, index), view_);
      if (!begun) s_.block.begin(view_.k, view_.v, section.content());
      begun = true;
      s_.block.absorb(s_.tiles + i * FusedBackward::kTileFloats, static_cast<int>(t.rows), view_,
                      s_.total + i * kTileRows, s_.along + i * kTileRows,
                      s_.grad_q + i * kTileRows * key_stride_, of_section(s_.slopes, i, index));
    }
    if (begun)
      s_.block.finish(s_.grad_k + section.begin * key_stride_,
                      s_.grad_v + section.begin * value_stride_);
  }

  // What flows through the gates of tile i.
  void add_gates(const Tile& t, std::int64_t i) {
    const int rows = static_cast<int>(t.rows), dim = plan_.key_dim();
    const auto scale = static_cast<float>(plan_.call.scale);
    copy_queries(tile_rows(plan_.call.q, t), rows, dim, s_.queries);
    panels(t, [&](std::int64_t first, std::int64_t count) {
      std::fill_n(s_.landmark_grads, kPanel * kKeyStride, 0.0F);
      gate_gradients(of_section(s_.slopes, i, first), count, s_.landmarks, s_.queries, rows, dim,
                     s_.grad_q + i * kTileRows * key_stride_, key_stride_, s_.landmark_grads);
      for (std::int64_t j = 0; j < count; ++j) {
        const Section& section = sections_[static_cast<std::size_t>(first + j)];
        if (!section.closed) continue;
        float* to = s_.grad_k + section.end * key_stride_;
        for (std::int64_t c = 0; c < dim; ++c)
          to[c] += scale * s_.landmark_grads[j * kKeyStride + c];
      }
    });
  }

  void write(const TensorView& to, const float* from, std::int64_t stride, int dim) const {
    store_rows(from, stride, static_cast<int>(plan_.S), dim,
               rows_of(to, static_cast<std::byte*>(to.data), b_, 0, head_, 1));
  }

  const Plan& plan_;
  const KernelGrads& grads_;
  std::int64_t b_, head_, key_stride_, value_stride_;
  std::span<const Section> sections_;
  Rows keys_;
  Scratch s_;
  SectionView view_;
};

}  // namespace

std::int64_t fused_backward_bytes(const Plan& plan, std::int64_t most_sections) {
  Arena arena(nullptr);
  const Scratch measured(plan, most_sections, arena);
  return arena.used();
}

void fused_backward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
                    std::int64_t most_sections, Arena& arena) {
  HeadBackward(plan, grads, b, head, most_sections, arena).run();
}

}  // namespace everlong::landmark
