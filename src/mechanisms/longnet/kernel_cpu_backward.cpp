#include <cstring>

#include "mechanisms/longnet/kernel.h"
#include "mechanisms/longnet/kernel_cpu_plan.h"

namespace everlong::longnet {
namespace {

// Longest segment of the call in tiles of queries, all folds: each thread holds their gradients.
std::int64_t most_tiles(const Plan& plan) {
  std::int64_t most = 0;
  for (const KernelPiece& piece : plan.call.pieces)
    most = std::max(most, parts(piece.run.queries, plan.tokens));
  return most * plan.folds;
}

struct Scratch {
  std::byte* block;
  float *grad_q, *tile_q, *tile_k, *tile_v;

  static std::int64_t bytes(const Plan& plan) {
    const cpu::SoftmaxShape shape = plan.shape();
    return cpu::aligned(cpu::SoftmaxBackward::scratch_bytes(shape.key_dim, shape.value_dim)) +
           most_tiles(plan) * tile_floats(plan) * 4 +
           cpu::aligned(kTileRows * std::int64_t{shape.key_dim} * 4) +
           cpu::aligned(kTileKeys * std::int64_t{shape.key_dim} * 4) +
           cpu::aligned(kTileKeys * std::int64_t{shape.value_dim} * 4);
  }
  static std::int64_t tile_floats(const Plan& plan) {
    return kTileRows * cpu::SoftmaxBackward(plan.shape(), nullptr).grad_q_stride();
  }
  Scratch(const Plan& plan, std::byte* next) : block(next) {
    const cpu::SoftmaxShape shape = plan.shape();
    const auto take = [&](std::int64_t size) {
      auto* const at = reinterpret_cast<float*>(next);
      next += size;
      return at;
    };
    next += cpu::aligned(cpu::SoftmaxBackward::scratch_bytes(shape.key_dim, shape.value_dim));
    grad_q = take(most_tiles(plan) * tile_floats(plan) * 4);
    tile_q = take(cpu::aligned(kTileRows * std::int64_t{shape.key_dim} * 4));
    tile_k = take(cpu::aligned(kTileKeys * std::int64_t{shape.key_dim} * 4));
    tile_v = take(cpu::aligned(kTileKeys * std::int64_t{shape.value_dim} * 4));
  }
};

cpu::MutableRows plain_rows(float* data, std::int64_t dim) {
  return {data, DType::kFloat32, dim, 0, 1};
}

void add_rows(const float* from, std::int64_t rows, std::int64_t dim, const cpu::MutableRows& to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* out = static_cast<float*>(to.data) + to.at(r);
    for (std::int64_t c = 0; c < dim; ++c) out[c] += from[r * dim + c];
  }
}

struct BackwardJob {
  const Plan& plan;
  const KernelGrads& grads;
  ConstTensorView delta;

  // One segment of one key head: its keys stay, its queries pass by.
  void run(const KernelPiece& piece, const Place& place, const Scratch& s) const {
    const LatticeRun& run = piece.run;
    const cpu::SoftmaxShape shape = plan.shape();
    const std::int64_t tiles = parts(run.queries, plan.tokens), floats = Scratch::tile_floats(plan);
    std::memset(s.grad_q, 0, static_cast<std::size_t>(tiles * plan.folds * floats) * sizeof(float));
    cpu::SoftmaxBackward block(shape, s.block);
    TileSight sight;
    const auto rows_in = [&](std::int64_t tile) {
      return std::min(plan.tokens, run.queries - tile * plan.tokens) * plan.fold;
    };
    // Keys [begin, end), counted from the buffer's first row.
    const auto absorb_keys = [&](const cpu::Rows& k, const cpu::Rows& v, std::int64_t begin,
                                 std::int64_t end, const cpu::MutableRows& grad_k,
                                 const cpu::MutableRows& grad_v) {
      block.begin({k, v, end - begin, nullptr});
      const std::int64_t first_query =
          plan.call.causal ? std::max<std::int64_t>(begin - (run.all_keys() - run.queries), 0) : 0;
      for (std::int64_t tile = first_query / plan.tokens; tile < tiles; ++tile)
        for (std::int64_t fold = 0; fold < plan.folds; ++fold) {
          const std::int64_t query = tile * plan.tokens;
          sight.set(plan, run, query, rows_in(tile), begin);
          block.absorb(
              {query_rows(plan, piece, place, plan.call.q, query, fold),
               query_rows(plan, piece, place, grads.grad_o, query, fold),
               query_rows(plan, piece, place, grads.lse, query, fold),
               query_rows(plan, piece, place, delta, query, fold), static_cast<int>(rows_in(tile))},
              sight.view(), s.grad_q + (tile * plan.folds + fold) * floats);
        }
      block.finish(plain_rows(s.tile_k, shape.key_dim), plain_rows(s.tile_v, shape.value_dim));
      add_rows(s.tile_k, end - begin, shape.key_dim, grad_k);
      add_rows(s.tile_v, end - begin, shape.value_dim, grad_v);
    };
    for (std::int64_t key = 0; key < run.past; key += kTileKeys)
      absorb_keys(past_rows(place, plan.call.past_k[piece.pattern], key),
                  past_rows(place, plan.call.past_v[piece.pattern], key), key,
                  std::min<std::int64_t>(key + kTileKeys, run.past),
                  past_rows(place, grads.grad_past_k[piece.pattern], key),
                  past_rows(place, grads.grad_past_v[piece.pattern], key));
    for (std::int64_t key = 0; key < run.keys; key += kTileKeys)
      absorb_keys(
          key_rows(piece, place, plan.call.k, key), key_rows(piece, place, plan.call.v, key),
          run.past + key, run.past + std::min<std::int64_t>(key + kTileKeys, run.keys),
          key_rows(piece, place, grads.grad_k, key), key_rows(piece, place, grads.grad_v, key));
    for (std::int64_t tile = 0; tile < tiles; ++tile)
      for (std::int64_t fold = 0; fold < plan.folds; ++fold) {
        cpu::softmax_write_grad_q(s.grad_q + (tile * plan.folds + fold) * floats, shape,
                                  static_cast<int>(rows_in(tile)),
                                  plain_rows(s.tile_q, shape.key_dim));
        add_rows(s.tile_q, rows_in(tile), shape.key_dim,
                 query_rows(plan, piece, place, grads.grad_q, tile * plan.tokens, fold));
      }
  }
};

}  // namespace

std::int64_t backward_workspace_bytes(const KernelCall& call, int threads) {
  const Plan plan(call);
  return cpu::aligned(plan.B * plan.T * plan.H * 4) + threads * Scratch::bytes(plan);
}

Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  EVERLONG_RETURN_IF_ERROR(cpu::check_workspace(
      workspace, backward_workspace_bytes(call, executor.threads()), "longnet"));
  const Plan plan(call);
  const std::int64_t T = plan.T, H = plan.H;
  const TensorView delta{workspace.data(), DType::kFloat32, {plan.B, T, H, 1}, {T * H, H, 1, 1}};
  std::byte* const scratch = workspace.data() + cpu::aligned(plan.B * T * H * 4);
  const std::int64_t bytes = Scratch::bytes(plan);

  cpu::spread(executor, plan.B * T, [&](std::int64_t unit, int) {
    const std::int64_t row = unit / T, token = unit % T;
    const auto heads = [&](const auto& x) {
      return rows_at(x, row * x.strides[0] + token * x.strides[1], x.strides[2], 0, 1);
    };
    cpu::softmax_delta(heads(grads.o), heads(grads.grad_o), static_cast<int>(H),
                       plan.shape().value_dim, heads(delta));
  });
  const BackwardJob job{plan, grads, delta};
  // Segments of a pattern have keys and queries of their own; the next pattern adds to the same.
  for (std::size_t begin = 0, end = 0; begin < call.pieces.size(); begin = end) {
    while (end < call.pieces.size() && call.pieces[end].pattern == call.pieces[begin].pattern)
      ++end;
    const auto pieces = call.pieces.subspan(begin, end - begin);
    std::int64_t total = 0;
    for (const KernelPiece& piece : pieces) total += units_of(plan, piece);
    cpu::spread(executor, total, [&](std::int64_t unit, int thread) {
      for (const KernelPiece& piece : pieces) {
        const std::int64_t mine = units_of(plan, piece);
        if (unit < mine) {
          job.run(piece, Place::of(piece, unit), Scratch(plan, scratch + thread * bytes));
          return;
        }
        unit -= mine;
      }
    });
  }
  return {};
}

}  // namespace everlong::longnet
