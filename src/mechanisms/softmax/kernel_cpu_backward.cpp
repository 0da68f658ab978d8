#include <cstring>
#include <utility>

#include "mechanisms/softmax/kernel.h"
#include "mechanisms/softmax/kernel_cpu_plan.h"

namespace everlong::softmax {
namespace {

// The backward of some keys of one key head of one sequence. Gradients of the queries go to tiles
// of `grad_q`, a set for every piece.
struct BackwardJob {
  const Plan& plan;
  const KernelGrads& grads;
  const std::int64_t* sums;
  float *delta, *grad_q;
  std::int64_t tile_floats, all_tiles;

  std::int64_t index_of(const Tile& t) const {
    return (sums[t.n] + t.tile) * plan.G * plan.folds + t.fold;
  }
  Tile tile_at(std::int64_t index) const {
    const Unit unit = Unit::of(plan, sums, 1, index);
    return Tile(plan, unit.n, unit.tile_begin, unit.fold);
  }
  float* tile_of(std::int64_t piece, std::int64_t index) const {
    return grad_q + (piece * all_tiles + index) * tile_floats;
  }

  // Pairs of a key tile, in rough units.
  std::int64_t weight(std::int64_t n, std::int64_t key_tile) const {
    const std::int64_t key = key_tile * kTileKeys;
    const std::int64_t first = std::max(key, plan.past(n)), all = plan.keys(n);
    const std::int64_t last =
        plan.call.window > 0 ? std::min(all, key + kTileKeys + plan.call.window) : all;
    return 1 + std::max<std::int64_t>(last - first, 0) / plan.tokens;
  }
  // Key tiles [begin, end) of a piece: pieces of even weight.
  std::pair<std::int64_t, std::int64_t> range(std::int64_t n, std::int64_t piece) const {
    const std::int64_t count = plan.key_tiles(n), pieces = plan.pieces();
    std::int64_t total = 0, sum = 0, begin = 0, end = 0;
    for (std::int64_t i = 0; i < count; ++i) total += weight(n, i);
    for (std::int64_t i = 0; i < count; ++i) {
      // A tile belongs to the piece in which its middle lies.
      const std::int64_t own = weight(n, i);
      const std::int64_t mine = std::min(pieces - 1, (2 * sum + own) * pieces / (2 * total));
      begin += mine < piece;
      end += mine <= piece;
      sum += own;
    }
    return {begin, end};
  }
  // Tiles of queries [begin, end) that see any of the keys [from, to).
  std::pair<std::int64_t, std::int64_t> seers(std::int64_t n, std::int64_t from,
                                              std::int64_t to) const {
    const std::int64_t first = std::max<std::int64_t>(from - plan.past(n), 0);
    const std::int64_t last =
        plan.call.window > 0 ? std::min(to - 1 + plan.call.window - plan.past(n), plan.length(n))
                             : plan.length(n);
    if (from >= to || first >= last) return {0, 0};
    return {first / plan.tokens, parts(last, plan.tokens)};
  }

  void run(std::int64_t unit, std::byte* scratch) const {
    const std::int64_t pieces = plan.pieces(), piece = unit % pieces;
    const std::int64_t head = unit / pieces % plan.G, n = unit / pieces / plan.G;
    const auto [first, last] = range(n, piece);
    const std::int64_t all = plan.keys(n);
    const auto [tile_begin, tile_end] =
        seers(n, first * kTileKeys, std::min(last * kTileKeys, all));
    for (std::int64_t tile = tile_begin; tile < tile_end; ++tile)
      for (std::int64_t fold = head * plan.folds; fold < (head + 1) * plan.folds; ++fold)
        std::memset(tile_of(piece, index_of(Tile(plan, n, tile, fold))), 0,
                    static_cast<std::size_t>(tile_floats) * sizeof(float));
    cpu::SoftmaxBackward block(plan.shape(), scratch);
    const ConstTensorView lse = transposed(grads.lse);
    TileSight sight;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t key = i * kTileKeys, end = std::min<std::int64_t>(key + kTileKeys, all);
      block.begin({key_rows(plan, plan.call.k, n, key, head),
                   key_rows(plan, plan.call.v, n, key, head), end - key, nullptr});
      const auto [from, to] = seers(n, key, end);
      for (std::int64_t tile = from; tile < to; ++tile)
        for (std::int64_t fold = head * plan.folds; fold < (head + 1) * plan.folds; ++fold) {
          const Tile t(plan, n, tile, fold);
          sight.set(plan, t, key);
          block.absorb(
              {tile_rows(plan, plan.call.q, t), tile_rows(plan, grads.grad_o, t),
               tile_rows(plan, lse, t), tile_rows(plan, delta_view(), t), static_cast<int>(t.rows)},
              sight.view(), tile_of(piece, index_of(t)));
        }
      block.finish(key_rows(plan, grads.grad_k, n, key, head),
                   key_rows(plan, grads.grad_v, n, key, head));
    }
  }

  ConstTensorView delta_view() const {
    return {delta, DType::kFloat32, {plan.B, plan.T, plan.H, 1}, {plan.T * plan.H, plan.H, 1, 1}};
  }

  // The sum over the pieces, in their order, is the gradient of a tile.
  void write_grad_q(std::int64_t unit) const {
    const Tile t = tile_at(unit);
    float* sum = nullptr;
    for (std::int64_t piece = 0; piece < plan.pieces(); ++piece) {
      const auto [first, last] = range(t.n, piece);
      const auto [begin, end] =
          seers(t.n, first * kTileKeys, std::min(last * kTileKeys, plan.keys(t.n)));
      if (t.tile < begin || t.tile >= end) continue;
      float* part = tile_of(piece, index_of(t));
      for (std::int64_t i = 0; sum != nullptr && i < tile_floats; ++i) sum[i] += part[i];
      if (sum == nullptr) sum = part;
    }
    if (sum == nullptr) {
      sum = tile_of(0, index_of(t));
      std::fill(sum, sum + tile_floats, 0.0F);
    }
    cpu::softmax_write_grad_q(sum, plan.shape(), static_cast<int>(t.rows),
                              tile_rows(plan, grads.grad_q, t));
  }
};

}  // namespace

std::int64_t backward_workspace_bytes(const KernelCall& call, int threads) {
  const Plan plan(call);
  const cpu::SoftmaxShape shape = plan.shape();
  std::int64_t tiles = 0;
  for (std::int64_t n = 0; n < plan.sequences; ++n) tiles += plan.tiles(n);
  const std::int64_t tile_floats = kTileRows * cpu::SoftmaxBackward(shape, nullptr).grad_q_stride();
  return aligned((plan.sequences + 1) * 8) + aligned(plan.B * plan.T * plan.H * 4) +
         plan.pieces() * tiles * plan.G * plan.folds * tile_floats * 4 +
         threads * aligned(cpu::SoftmaxBackward::scratch_bytes(shape.key_dim, shape.value_dim));
}

Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, backward_workspace_bytes(call, executor.threads())));
  const Plan plan(call);
  const cpu::SoftmaxShape shape = plan.shape();
  std::byte* next = workspace.data();
  BackwardJob job{plan, grads, nullptr, nullptr, nullptr, 0, 0};
  job.sums = count_units(plan, 1, next);
  job.delta = reinterpret_cast<float*>(next);
  next += aligned(plan.B * plan.T * plan.H * 4);
  job.tile_floats = kTileRows * cpu::SoftmaxBackward(shape, nullptr).grad_q_stride();
  job.all_tiles = job.sums[plan.sequences] * plan.G * plan.folds;
  job.grad_q = reinterpret_cast<float*>(next);
  next += plan.pieces() * job.all_tiles * job.tile_floats * 4;
  const std::int64_t bytes =
      aligned(cpu::SoftmaxBackward::scratch_bytes(shape.key_dim, shape.value_dim));

  spread(executor, job.all_tiles, [&](std::int64_t unit, int) {
    const Tile t = job.tile_at(unit);
    const TensorView delta{job.delta, DType::kFloat32, job.delta_view().sizes,
                           job.delta_view().strides};
    cpu::softmax_delta(tile_rows(plan, grads.o, t), tile_rows(plan, grads.grad_o, t),
                       static_cast<int>(t.rows), shape.value_dim, tile_rows(plan, delta, t));
  });
  spread(executor, plan.sequences * plan.G * plan.pieces(),
         [&](std::int64_t unit, int thread) { job.run(unit, next + thread * bytes); });
  spread(executor, job.all_tiles, [&](std::int64_t unit, int) { job.write_grad_q(unit); });
  return {};
}

}  // namespace everlong::softmax
