#include <cmath>

#include "mechanisms/longnet/kernel.h"
#include "mechanisms/longnet/kernel_cpu_plan.h"

namespace everlong::longnet {

Status check_kernel_call(const KernelCall& c) {
  if ((c.q.dtype != DType::kFloat32 && c.q.dtype != DType::kBFloat16) || c.k.dtype != c.q.dtype ||
      c.v.dtype != c.q.dtype)
    return unsupported("longnet: the CPU kernel was given ", info(c.q.dtype).name, ", ",
                       info(c.k.dtype).name, ", ", info(c.v.dtype).name,
                       "; it takes fp32 or bf16, one for q, k and v");
  for (const auto* x : {&c.q, &c.k, &c.v}) {
    if (x->sizes[3] < 1 || x->sizes[3] > cpu::kMostDim)
      return unsupported("longnet: key dim ", c.q.sizes[3], " and value dim ", c.v.sizes[3],
                         "; the CPU kernel takes 1 to ", cpu::kMostDim);
    if (x->sizes[3] > 1 && x->strides[3] != 1)
      return unsupported("longnet: the CPU kernel needs q, k, v with a contiguous last dimension");
  }
  return {};
}

namespace {

constexpr std::int64_t kMostTogether = cpu::SoftmaxForward::kMostTogether;
// Calls of so few tokens give each key head one unit that walks all patterns: a barrier a pattern
// would cost more than the work.
constexpr std::int64_t kFewTokens = 8;

std::int64_t tile_bytes(const Plan& plan) {
  const cpu::SoftmaxShape shape = plan.shape();
  return cpu::aligned(cpu::SoftmaxForward::scratch_bytes(shape.key_dim, shape.value_dim));
}

struct ForwardJob {
  const Plan& plan;
  const TensorView &o, &lse;
  std::byte* scratch;  // of all threads
  std::int64_t bytes;  // of a tile

  // Tiles [first, last) of one fold of one segment.
  void run(const KernelPiece& piece, const Place& place, std::int64_t fold, std::int64_t first,
           std::int64_t last, int thread) const {
    std::byte* mine = scratch + thread * kMostTogether * bytes;
    const auto block = [&](std::int64_t i) {
      return cpu::SoftmaxForward(plan.shape(), mine + i * bytes);
    };
    cpu::SoftmaxForward blocks[] = {block(0), block(1), block(2), block(3)};
    TileSight sights[kMostTogether];
    cpu::Sight views[kMostTogether];
    const auto count = static_cast<std::size_t>(last - first);
    const LatticeRun& run = piece.run;
    const auto rows_in = [&](std::int64_t tile) {
      return std::min(plan.tokens, run.queries - tile * plan.tokens) * plan.fold;
    };
    const auto look = [&](std::int64_t key) {
      for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t tile = first + static_cast<std::int64_t>(i);
        sights[i].set(plan, run, tile * plan.tokens, rows_in(tile), key);
        views[i] = sights[i].view();
      }
    };
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t tile = first + static_cast<std::int64_t>(i), query = tile * plan.tokens;
      blocks[i].begin(query_rows(plan, piece, place, plan.call.q, query, fold),
                      static_cast<int>(rows_in(tile)));
      blocks[i].resume(query_rows(plan, piece, place, o, query, fold),
                       query_rows(plan, piece, place, lse, query, fold));
    }
    const auto absorb = [&](const cpu::KeyRun& keys) {
      cpu::SoftmaxForward::absorb_together({blocks, count}, keys, {views, count});
    };
    if (run.past > 0) {
      look(0);
      absorb({past_rows(place, plan.call.past_k[piece.pattern], 0),
              past_rows(place, plan.call.past_v[piece.pattern], 0), run.past, nullptr});
    }
    look(run.past);
    absorb({key_rows(piece, place, plan.call.k, 0), key_rows(piece, place, plan.call.v, 0),
            run.keys, nullptr});
    if (run.phantom > 0) absorb_zeros(blocks, count, run.phantom, rows_in, first);
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t query = (first + static_cast<std::int64_t>(i)) * plan.tokens;
      blocks[i].finish(query_rows(plan, piece, place, o, query, fold),
                       query_rows(plan, piece, place, lse, query, fold));
    }
  }

  // One key and value of zeros that counts as `zeros` of them.
  template <class RowsIn>
  static void absorb_zeros(cpu::SoftmaxForward* blocks, std::size_t count, std::int64_t zeros,
                           const RowsIn& rows_in, std::int64_t first) {
    static constexpr float kZeros[cpu::kMostDim] = {};
    const cpu::Rows nothing{kZeros, DType::kFloat32, 0, 0, 1};
    const float bias = std::log(static_cast<float>(zeros));
    TileSight all;
    std::fill_n(all.begin, kTileRows, 0);
    std::fill_n(all.end, kTileRows, 1);
    for (std::size_t i = 0; i < count; ++i) {
      if (rows_in(first + static_cast<std::int64_t>(i)) == 0) continue;
      blocks[i].absorb({nothing, nothing, 1, &bias}, all.view());
    }
  }
};

}  // namespace

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads) {
  return threads * kMostTogether * tile_bytes(Plan(call));
}

Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  EVERLONG_RETURN_IF_ERROR(cpu::check_workspace(
      workspace, forward_workspace_bytes(call, executor.threads()), "longnet"));
  const Plan plan(call);
  const ForwardJob job{plan, o, lse, workspace.data(), tile_bytes(plan)};
  const std::int64_t most =
      plan.shape().key_dim + plan.shape().value_dim <= 256 ? kMostTogether : 2;

  if (plan.T <= kFewTokens) {
    cpu::spread(executor, plan.B * plan.G, [&](std::int64_t unit, int thread) {
      const std::int64_t row = unit / plan.G, head = unit % plan.G;
      for (const KernelPiece& piece : call.pieces) {
        const std::int64_t from = head - piece.heads.first;
        if (from < 0 || from % piece.heads.step != 0 ||
            from / piece.heads.step >= piece.heads.count)
          continue;
        for (std::int64_t segment = 0; segment < piece.run.segments; ++segment)
          for (std::int64_t fold = 0; fold < plan.folds; ++fold)
            for (std::int64_t tile = 0; tile * plan.tokens < piece.run.queries; ++tile)
              job.run(piece, {row, head, segment}, fold, tile, tile + 1, thread);
      }
    });
    return {};
  }
  // All pieces of a pattern touch different rows; the next pattern waits for them.
  for (std::size_t begin = 0, end = 0; begin < call.pieces.size(); begin = end) {
    while (end < call.pieces.size() && call.pieces[end].pattern == call.pieces[begin].pattern)
      ++end;
    const auto pieces = call.pieces.subspan(begin, end - begin);
    const auto together_in = [&](const KernelPiece& piece) {
      // Fewer tiles a unit where there are few units.
      const std::int64_t tiles = parts(piece.run.queries, plan.tokens);
      const std::int64_t all = tiles * plan.folds * units_of(plan, piece);
      return std::clamp<std::int64_t>(all / 32, 1,
                                      std::min(most, std::max<std::int64_t>(tiles, 1)));
    };
    std::int64_t total = 0;
    for (const KernelPiece& piece : pieces)
      total += units_of(plan, piece) * plan.folds *
               parts(parts(piece.run.queries, plan.tokens), together_in(piece));
    cpu::spread(executor, total, [&](std::int64_t unit, int thread) {
      for (const KernelPiece& piece : pieces) {
        const std::int64_t tiles = parts(piece.run.queries, plan.tokens),
                           together = together_in(piece), groups = parts(tiles, together),
                           mine = units_of(plan, piece) * plan.folds * groups;
        if (unit >= mine) {
          unit -= mine;
          continue;
        }
        // The last tiles of a segment see most: first.
        const std::int64_t first = (groups - 1 - unit % groups) * together;
        const std::int64_t rest = unit / groups;
        job.run(piece, Place::of(piece, rest / plan.folds), rest % plan.folds, first,
                std::min(first + together, tiles), thread);
        return;
      }
    });
  }
  return {};
}

}  // namespace everlong::longnet
