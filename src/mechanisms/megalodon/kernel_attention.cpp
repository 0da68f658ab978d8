#include "mechanisms/megalodon/kernel_attention.h"

#include <algorithm>

#include "kernels/cpu/softmax_block.h"

namespace everlong::megalodon {
namespace {

using cpu::kTileKeys;
using cpu::kTileRows;

constexpr std::int64_t kSlice = cpu::kMostDim;  // of the values

std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }
std::int64_t parts(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

// Rows [first, ..) of head h of batch row r, from coordinate `column` on.
template <class View>
auto rows_at(const View& x, std::int64_t r, std::int64_t first, std::int64_t h,
             std::int64_t column) {
  using Void = std::remove_pointer_t<decltype(x.data)>;
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  const std::int64_t at =
      r * x.strides[0] + first * x.strides[1] + h * x.strides[2] + column * x.strides[3];
  const auto size = static_cast<std::int64_t>(info(x.dtype).bytes);
  return cpu::BasicRows<Void>{static_cast<Byte*>(x.data) + at * size, x.dtype, x.strides[1], 0, 1};
}

// Numbers [1, R, H, T] as rows of one number.
template <class Void>
cpu::BasicRows<Void> numbers_at(Void* data, const AttentionCall& call, std::int64_t r,
                                std::int64_t h, std::int64_t first) {
  using Number = std::conditional_t<std::is_const_v<Void>, const float, float>;
  if (data == nullptr) return {};
  return {static_cast<Number*>(data) + (r * call.heads() + h) * call.queries() + first,
          DType::kFloat32, 1, 0, 1};
}

// What a tile of queries sees of keys from `key` on.
struct TileSight {
  std::int64_t begin[kTileRows], end[kTileRows];
  TileSight(const AttentionCall& call, std::int64_t first, std::int64_t count, std::int64_t key) {
    for (std::int64_t i = 0; i < count; ++i) {
      begin[i] = 0;
      end[i] = call.keys() - call.queries() + first + i + 1 - key;
    }
  }
  cpu::Sight view() const { return {begin, end}; }
};

cpu::SoftmaxShape shape_of(const AttentionCall& call, std::int64_t column) {
  return {static_cast<int>(call.key_dim()),
          static_cast<int>(std::min(kSlice, call.value_dim() - column)), 1};
}

std::int64_t forward_scratch(const AttentionCall& call) {
  return aligned(cpu::SoftmaxForward::scratch_bytes(
      static_cast<int>(call.key_dim()), static_cast<int>(std::min(kSlice, call.value_dim()))));
}

// The backward's memory of one thread, in bytes from its start.
struct BackwardPlan {
  std::int64_t dq, dk, slice_dk, delta, block, bytes;
  std::int64_t tiles, tile_floats, padded;

  explicit BackwardPlan(const AttentionCall& call) {
    const cpu::SoftmaxShape shape = shape_of(call, 0);
    tiles = parts(call.queries(), kTileRows);
    padded = cpu::SoftmaxBackward(shape, nullptr).grad_q_stride();
    tile_floats = kTileRows * padded;
    dq = 0;
    dk = dq + aligned(tiles * tile_floats * 4);
    slice_dk = dk + aligned(call.keys() * call.key_dim() * 4);
    delta = slice_dk + aligned(kTileKeys * call.key_dim() * 4);
    block = delta + aligned(call.queries() * 4);
    bytes = block + aligned(cpu::SoftmaxBackward::scratch_bytes(shape.key_dim, shape.value_dim));
  }
};

// All keys of one head of one row. grad_q and grad_k sum over the slices of the values.
void backward_head(const AttentionCall& call, const AttentionGrads& grads, const BackwardPlan& plan,
                   std::int64_t r, std::int64_t h, std::byte* memory) {
  auto* dq = reinterpret_cast<float*>(memory + plan.dq);
  auto* dk = reinterpret_cast<float*>(memory + plan.dk);
  auto* slice_dk = reinterpret_cast<float*>(memory + plan.slice_dk);
  auto* delta = reinterpret_cast<float*>(memory + plan.delta);
  const std::int64_t T = call.queries(), S = call.keys(), K = call.key_dim(), past = S - T;
  std::fill(dq, dq + plan.tiles * plan.tile_floats, 0.0F);
  std::fill(dk, dk + S * K, 0.0F);
  for (std::int64_t column = 0; column < call.value_dim(); column += kSlice) {
    const cpu::SoftmaxShape shape = shape_of(call, column);
    cpu::softmax_delta(rows_at(grads.o, r, 0, h, column), rows_at(grads.grad_o, r, 0, h, column),
                       static_cast<int>(T), shape.value_dim, {delta, DType::kFloat32, 1, 0, 1});
    cpu::SoftmaxBackward block(shape, memory + plan.block);
    for (std::int64_t key = 0; key < S; key += kTileKeys) {
      const std::int64_t count = std::min<std::int64_t>(kTileKeys, S - key);
      block.begin(
          {rows_at(call.k, r, key, h, 0), rows_at(call.v, r, key, h, column), count, nullptr});
      // The first query that sees any of these keys sits at the first of them.
      for (std::int64_t tile = std::max<std::int64_t>(key - past, 0) / kTileRows; tile < plan.tiles;
           ++tile) {
        const std::int64_t first = tile * kTileRows,
                           rows = std::min<std::int64_t>(kTileRows, T - first);
        const TileSight sight(call, first, rows, key);
        block.absorb({rows_at(call.q, r, first, h, 0),
                      rows_at(grads.grad_o, r, first, h, column),
                      numbers_at(grads.lse.data, call, r, h, first),
                      {delta + first, DType::kFloat32, 1, 0, 1},
                      static_cast<int>(rows)},
                     sight.view(), dq + tile * plan.tile_floats);
      }
      block.finish({slice_dk, DType::kFloat32, K, 0, 1}, rows_at(grads.grad_v, r, key, h, column));
      for (std::int64_t i = 0; i < count * K; ++i) dk[key * K + i] += slice_dk[i];
    }
  }
  const cpu::SoftmaxShape shape = shape_of(call, 0);
  for (std::int64_t tile = 0; tile < plan.tiles; ++tile)
    cpu::softmax_write_grad_q(
        dq + tile * plan.tile_floats, shape,
        static_cast<int>(std::min<std::int64_t>(kTileRows, T - tile * kTileRows)),
        rows_at(grads.grad_q, r, tile * kTileRows, h, 0));
  // Into the keys' dtype, by the same conversion: rows padded as those of the queries are.
  for (std::int64_t key = 0; key < S; key += kTileRows) {
    const std::int64_t rows = std::min<std::int64_t>(kTileRows, S - key);
    for (std::int64_t i = 0; i < rows; ++i)
      std::copy_n(dk + (key + i) * K, K, dq + i * plan.padded);
    cpu::softmax_write_grad_q(dq, shape, static_cast<int>(rows),
                              rows_at(grads.grad_k, r, key, h, 0));
  }
}

Status check_workspace(std::span<std::byte> workspace, std::int64_t bytes) {
  if (static_cast<std::int64_t>(workspace.size()) >= bytes) return {};
  return invalid_argument("megalodon: the attention kernel was given ", workspace.size(),
                          " bytes of workspace; ", bytes, " are needed");
}

}  // namespace

Status check_attention_call(const AttentionCall& c) {
  for (const ConstTensorView* x : {&c.q, &c.k, &c.v}) {
    if ((x->dtype != DType::kFloat32 && x->dtype != DType::kBFloat16) || x->dtype != c.q.dtype)
      return unsupported("megalodon: the attention kernel was given ", info(x->dtype).name,
                         "; it takes fp32 or bf16, one for q, k and v");
    if (x->sizes[3] > 1 && x->strides[3] != 1)
      return unsupported(
          "megalodon: the attention kernel needs q, k, v with a contiguous last dimension");
  }
  if (c.key_dim() < 1 || c.key_dim() > cpu::kMostDim)
    return unsupported("megalodon: a key dim of ", c.key_dim(),
                       "; the attention kernel takes 1 to ", cpu::kMostDim);
  if (c.keys() < c.queries())
    return invalid_argument("megalodon: ", c.queries(), " queries and ", c.keys(),
                            " keys; the queries' own keys must be among them");
  return {};
}

std::int64_t attention_forward_bytes(const AttentionCall& call, int threads) {
  return forward_scratch(call) * threads;
}

Status attention_forward(const AttentionCall& call, const TensorView& o, const TensorView& lse,
                         std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_attention_call(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, attention_forward_bytes(call, executor.threads())));
  const std::int64_t tiles = parts(call.queries(), kTileRows),
                     slices = parts(call.value_dim(), kSlice), bytes = forward_scratch(call);
  executor.run(call.rows() * call.heads() * slices * tiles, [&](std::int64_t unit, int thread) {
    // Long tiles first: they see the most keys.
    const std::int64_t tile = tiles - 1 - unit / (call.rows() * call.heads() * slices);
    const std::int64_t column = unit % slices * kSlice, head = unit / slices % call.heads(),
                       row = unit / slices / call.heads() % call.rows();
    const std::int64_t first = tile * kTileRows,
                       rows = std::min<std::int64_t>(kTileRows, call.queries() - first);
    cpu::SoftmaxForward block(shape_of(call, column), workspace.data() + thread * bytes);
    block.begin(rows_at(call.q, row, first, head, 0), static_cast<int>(rows));
    const TileSight sight(call, first, rows, 0);
    block.absorb({rows_at(call.k, row, 0, head, 0), rows_at(call.v, row, 0, head, column),
                  call.keys() - call.queries() + first + rows, nullptr},
                 sight.view());
    block.finish(rows_at(o, row, first, head, column),
                 column == 0 ? numbers_at(lse.data, call, row, head, first) : cpu::MutableRows{});
  });
  return {};
}

std::int64_t attention_backward_bytes(const AttentionCall& call, int threads) {
  return BackwardPlan(call).bytes * threads;
}

Status attention_backward(const AttentionCall& call, const AttentionGrads& grads,
                          std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_attention_call(call));
  const BackwardPlan plan(call);
  EVERLONG_RETURN_IF_ERROR(check_workspace(workspace, plan.bytes * executor.threads()));
  executor.run(call.rows() * call.heads(), [&](std::int64_t unit, int thread) {
    backward_head(call, grads, plan, unit / call.heads(), unit % call.heads(),
                  workspace.data() + thread * plan.bytes);
  });
  return {};
}

}  // namespace everlong::megalodon
