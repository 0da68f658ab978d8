// The chunk engine on Hopper, host side.
#include <cuda_runtime.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "kernels/cuda/tensor_map.h"
#include "mechanisms/lightning/kernel_cuda_check.h"
#include "mechanisms/lightning/kernel_sm90_engine.cuh"
#include "mechanisms/lightning/kernel_sm90_gradients.cuh"
#include "mechanisms/lightning/kernel_sm90_plan.h"

namespace everlong::lightning {
namespace {

using engine::chunks_of;
using engine::kChunk;
using engine::kMaxRanges;
using engine::Launch;
using engine::Pass;
using engine::Plan;
using engine::StateRows;
using Sizes = std::array<std::int64_t, 4>;

// carried [units, parts, size]: of each part alone -> of all up to its end. Chunks of all but the
// first part are full ones (against time, the short one is in the first). Grid (units, any).
__global__ void __launch_bounds__(1024) add_up_all_parts(const __grid_constant__ Launch p) {
  constexpr int kAtOnce = 16;  // loads in flight
  __shared__ float lost[kMaxRanges];
  hopper::let_next_launch_start();
  const int size = p.carried_size, unit = static_cast<int>(blockIdx.x), last = p.parts - 1;
  for (int part = static_cast<int>(threadIdx.x); part < last; part += blockDim.x) {
    const int chunks = engine::chunks_before(p, part + 1) - engine::chunks_before(p, part);
    lost[part] = expm1f(-p.slope[unit % p.heads] * static_cast<float>(chunks * kChunk));
  }
  __syncthreads();
  hopper::wait_for_launch_before();
  float* carried = p.carried + static_cast<std::int64_t>(unit) * p.parts * size;
  for (int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.y * blockDim.x)) {
    float sum = 0;
    for (int first = 0; first < last; first += kAtOnce) {
      float own[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        own[j] = first + j < last ? carried[std::int64_t{first + j} * size + i] : 0.0f;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < last) {
          sum += fmaf(sum, lost[first + j], own[j]);
          carried[std::int64_t{first + j} * size + i] = sum;
        }
    }
  }
}

int processors() {
  int device = 0, count = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::clamp(count, 1, kMaxRanges);
}

Launch make_launch(const Pass& pass, int keys, int values, int value_blocks) {
  const auto [B, T, H, K] = pass.sizes_BTHK;
  Launch p{};
  p.in = pass.in;
  p.out = pass.out;
  p.tokens = static_cast<int>(T);
  p.heads = static_cast<int>(H);
  p.chunks = chunks_of(T);
  p.K = static_cast<int>(K);
  p.V = static_cast<int>(pass.V);
  p.value_blocks = value_blocks;
  p.scale = static_cast<float>(pass.scale);
  p.carried = static_cast<float*>(pass.workspace);
  p.carried_size = engine::groups_of(keys) * 64 * values * value_blocks;
  p.exact = pass.exact;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    p.slope[h] = static_cast<float>(pass.slope_H[h]);
  const auto packed = pass.packing.cu_seqlens;
  if (!packed.empty()) {
    p.sequences = static_cast<int>(packed.size()) - 1;
    p.first_token = pass.packing.offsets;
    p.first_chunk = pass.packing.offsets + packed.size();
  }
  const Plan plan = engine::make_plan(pass, processors() / value_blocks);
  p.ranges = plan.ranges;
  p.parts = plan.parts;
  if (p.ranges > 0) std::copy_n(plan.cut.begin(), p.ranges + 1, p.cut);
  return p;
}

// Whether every block may add up the states of the parts before its own: each costs it as much as
// reading one does.
bool may_add_up(const Launch& p) {
  constexpr int kMost = 4;
  int most = 0;
  for (int h = 0; h < p.heads; ++h)
    most = std::max(most, p.parts - 1 - engine::first_part(p, p.parts - 1, p.slope[h]));
  return most <= kMost;
}

struct Grid {
  dim3 blocks;
  int threads, shared_bytes;
  cudaStream_t stream;
};
// overlaps: it may start before the launch before it has ended, for which it waits by itself.
template <class Kernel, class... Arguments>
cudaError_t start(Kernel kernel, const Grid& grid, bool overlaps, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  config.stream = grid.stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// One block a processor: they start as those of the launch before end, and would else crowd where
// that happens first.
cudaError_t start_adding_up(const Launch& p, std::int64_t units, cudaStream_t on) {
  constexpr int kMoreThanHalf = 120 * 1024;  // of a processor's shared memory
  const cudaError_t error = cudaFuncSetAttribute(
      add_up_all_parts, cudaFuncAttributeMaxDynamicSharedMemorySize, kMoreThanHalf);
  if (error != cudaSuccess) return error;
  const int blocks = std::max(1, processors() / static_cast<int>(units));  // of a unit
  const int threads = std::min(1024, (p.carried_size / blocks + 127) / 128 * 128);
  return start(add_up_all_parts,
               {dim3(static_cast<unsigned>(units), static_cast<unsigned>(blocks)), threads,
                kMoreThanHalf, on},
               true, p);
}

// The kernel over all blocks; with parts, first for their states.
template <class Shape, class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, Launch p, std::int64_t units, void* stream,
                   const std::tuple<Arguments...>& arguments) {
  constexpr int kBytes = sizeof(typename Shape::Shared);
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto start_all = [&](std::int64_t blocks, bool overlaps) {
    if (error != cudaSuccess) return;
    const Grid grid{dim3(static_cast<unsigned>(blocks * p.value_blocks)), Shape::kThreads, kBytes,
                    on};
    error = std::apply(
        [&](const auto&... argument) { return start(kernel, grid, overlaps, argument..., p); },
        arguments);
  };
  if (p.parts > 1) {
    p.state_only = true;
    start_all(units * (p.parts - 1), false);
    p.state_only = false;
    p.adds_up = may_add_up(p);
    if (!p.adds_up && error == cudaSuccess) error = start_adding_up(p, units, on);
  }
  start_all(p.ranges > 0 ? p.ranges : units * p.parts, p.parts > 1);
  return error;
}

// Calls function(keys, values) with the padded dims as constants, for dims up to 128.
template <class Function>
auto with_padded_dims(std::int64_t K, std::int64_t V, const Function& function) {
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 96> k96;
  constexpr std::integral_constant<int, 128> k128;
  if (K > 64 && K <= 96 && V > 64 && V <= 96) return function(k96, k96);
  if (K <= 64) return V <= 64 ? function(k64, k64) : function(k64, k128);
  return V <= 64 ? function(k128, k64) : function(k128, k128);
}

// Larger ones go by blocks of the columns of V: the states of 256 keys fill a block's registers at
// 64 of them.
constexpr bool is_large(std::int64_t K, std::int64_t V) { return K > 128 || V > 128; }
template <class Function>
auto with_large_dims(std::int64_t K, const Function& function) {
  if (K > 128)
    return function(std::integral_constant<int, 256>(), std::integral_constant<int, 64>());
  return function(std::integral_constant<int, 128>(), std::integral_constant<int, 128>());
}

int columns_of_panels(std::int64_t K, std::int64_t V) {
  if (is_large(K, V)) return 64;
  return with_padded_dims(
      K, V, [](auto keys, auto values) { return engine::panel_columns(keys, values); });
}

Status as_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return unsupported("lightning: the Hopper kernel could not be launched: ",
                     cudaGetErrorString(error));
}

engine::OutputRows output_rows(const ConstTensorView& x) {
  return {static_cast<__nv_bfloat16*>(const_cast<void*>(x.data)), x.strides[1], x.strides[2]};
}

// kReverse, against time: of large dims alone.
template <bool kReverse = false>
Status run_forward(const ConstTensorView& q_view, const ConstTensorView& k_view,
                   const ConstTensorView& v_view, const ConstTensorView& o_view, const Pass& pass,
                   const CudaFused& fused, void* stream) {
  const int columns = columns_of_panels(q_view.sizes[3], v_view.sizes[3]);
  EVERLONG_ASSIGN(const CUtensorMap q, cuda::tiles_of(q_view, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap k, cuda::tiles_of(k_view, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap v, cuda::tiles_of(v_view, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap o, cuda::tiles_of(o_view, engine::kOutRows, columns));
  const auto start = [&](auto keys, auto values, auto any, int value_blocks) {
    Launch p = make_launch(pass, keys, values, value_blocks);
    p.silu_q = fused.silu_q, p.silu_k = fused.silu_k, p.silu_v = fused.silu_v;
    p.row_squares = fused.row_squares_BHT;
    return launch<engine::ForwardShape<keys, values, any>>(
        engine::forward_kernel<keys, values, any, kReverse>, p,
        pass.sizes_BTHK[0] * pass.sizes_BTHK[2], stream,
        std::tuple(q, k, v, o, output_rows(o_view)));
  };
  const std::int64_t K = pass.sizes_BTHK[3], V = pass.V;
  if constexpr (!kReverse)
    if (!is_large(K, V))
      return as_status(with_padded_dims(K, V, [&](auto keys, auto values) {
        return fused.any() ? start(keys, values, std::true_type(), 1)
                           : start(keys, values, std::false_type(), 1);
      }));
  return as_status(with_large_dims(K, [&](auto keys, auto values) {
    return start(keys, values, std::false_type(), static_cast<int>((V + values - 1) / values));
  }));
}

Status validate(const CudaTensors& call) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  const auto [B, T, H, K] = call.q_BTHK.sizes;
  const std::int64_t V = call.v_BTHV.sizes[3];
  const auto fits = [](std::int64_t dim) { return dim >= 8 && dim <= kCudaMaxDim && dim % 8 == 0; };
  if (!fits(K) || !fits(V))
    return unsupported("lightning: the Hopper kernel takes head dims of multiples of 8 up to ",
                       kCudaMaxDim, "; given K = ", K, ", V = ", V);
  // The line of all chunks is counted in 32 bits.
  if (chunks_of(T) + call.sequences() > INT32_MAX / 2 / (B * H))
    return unsupported("lightning: ", call.sequences(), " sequences of ", T, " tokens and ", H,
                       " heads are too many for one call; split the batch");
  return {};
}

StateRows rows_of(const ConstTensorView& x) {
  return {static_cast<float*>(const_cast<void*>(x.data)), x.strides[0], x.strides[1], x.strides[2],
          x.strides[3]};
}
StateRows transposed(StateRows state) {
  std::swap(state.row, state.column);
  return state;
}

// dK, dV and the state's gradient in one pass.
Status run_gradients(const CudaBackward& call, const Pass& pass, void* stream) {
  const int columns = columns_of_panels(pass.sizes_BTHK[3], pass.V);
  EVERLONG_ASSIGN(const CUtensorMap q, cuda::tiles_of(call.q_BTHK, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap k, cuda::tiles_of(call.k_BTHK, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap v, cuda::tiles_of(call.v_BTHV, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap grad_o, cuda::tiles_of(call.grad_o_BTHV, kChunk, columns));
  EVERLONG_ASSIGN(const CUtensorMap grad_k,
                  cuda::tiles_of(call.grad_k_BTHK, engine::kOutRows, columns));
  EVERLONG_ASSIGN(const CUtensorMap grad_v,
                  cuda::tiles_of(call.grad_v_BTHV, engine::kOutRows, columns));
  return as_status(with_padded_dims(pass.sizes_BTHK[3], pass.V, [&](auto keys, auto values) {
    const Launch p = make_launch(pass, keys, values, 1);
    return launch<engine::Gradients<keys, values>>(
        engine::gradients_kernel<keys, values>, p, pass.sizes_BTHK[0] * pass.sizes_BTHK[2], stream,
        std::tuple(q, k, v, grad_o, grad_k, grad_v, output_rows(call.grad_k_BTHK),
                   output_rows(call.grad_v_BTHV)));
  }));
}

}  // namespace

Status cuda_forward(const CudaForward& call, void* stream) {
  const ConstTensorView like_v[] = {call.o_BTHV},
                        states[] = {call.state_in_NHKV, call.state_out_NHKV};
  EVERLONG_RETURN_IF_ERROR(validate(
      {call.q_BTHK, call.k_BTHK, call.v_BTHV, {}, like_v, states, call.slope_H, call.packing}));
  if (call.fused.any() && is_large(call.q_BTHK.sizes[3], call.v_BTHV.sizes[3]))
    return unsupported("lightning: silu and row squares ride along with head dims up to ",
                       kCudaMaxFusedDim, "; given K = ", call.q_BTHK.sizes[3],
                       ", V = ", call.v_BTHV.sizes[3]);
  return run_forward(call.q_BTHK, call.k_BTHK, call.v_BTHV, call.o_BTHV,
                     {call.q_BTHK.sizes, call.v_BTHV.sizes[3], rows_of(call.state_in_NHKV),
                      rows_of(call.state_out_NHKV), call.slope_H, call.scale, call.exact,
                      call.workspace, call.packing, call.fused.any_silu()},
                     call.fused, stream);
}

Status cuda_backward(const CudaBackward& call, void* stream) {
  const ConstTensorView like_q[] = {call.grad_q_BTHK, call.grad_k_BTHK},
                        like_v[] = {call.grad_v_BTHV, call.grad_o_BTHV},
                        states[] = {call.state_in_NHKV, call.grad_state_NHKV,
                                    call.grad_state_in_NHKV};
  EVERLONG_RETURN_IF_ERROR(validate(
      {call.q_BTHK, call.k_BTHK, call.v_BTHV, like_q, like_v, states, call.slope_H, call.packing}));
  const std::int64_t K = call.q_BTHK.sizes[3], V = call.v_BTHV.sizes[3];
  const auto pass = [&](const Sizes& like_q, std::int64_t values, const StateRows& in,
                        const StateRows& out) {
    return Pass{like_q,     values,         in,          out, call.slope_H, call.scale,
                call.exact, call.workspace, call.packing};
  };
  // dQ is the forward pass of (dO, V, K), whose state is S transposed.
  EVERLONG_RETURN_IF_ERROR(run_forward(
      call.grad_o_BTHV, call.v_BTHV, call.k_BTHK, call.grad_q_BTHK,
      pass(call.v_BTHV.sizes, K, transposed(rows_of(call.state_in_NHKV)), {}), {}, stream));
  const StateRows grad_state = rows_of(call.grad_state_NHKV),
                  grad_state_in = rows_of(call.grad_state_in_NHKV);
  const Pass for_v = pass(call.q_BTHK.sizes, V, grad_state, grad_state_in);
  if (!is_large(K, V)) return run_gradients(call, for_v, stream);
  // dK first: the state's gradient may be written over that of the final state.
  EVERLONG_RETURN_IF_ERROR(
      run_forward<true>(call.v_BTHV, call.grad_o_BTHV, call.q_BTHK, call.grad_k_BTHK,
                        pass(call.v_BTHV.sizes, K, transposed(grad_state), {}), {}, stream));
  return run_forward<true>(call.k_BTHK, call.q_BTHK, call.grad_o_BTHV, call.grad_v_BTHV, for_v, {},
                           stream);
}

void cuda_offsets(std::span<const std::int64_t> cu_seqlens, std::span<std::int32_t> offsets) {
  std::int32_t chunks = 0;
  for (std::size_t i = 0; i < cu_seqlens.size(); ++i) {
    if (i > 0) chunks += chunks_of(cu_seqlens[i] - cu_seqlens[i - 1]);
    offsets[i] = static_cast<std::int32_t>(cu_seqlens[i]);
    offsets[cu_seqlens.size() + i] = chunks;
  }
}

std::int64_t cuda_workspace_bytes(std::int64_t sequences, std::int64_t heads, std::int64_t key_dim,
                                  std::int64_t value_dim) {
  const std::int64_t units = sequences * heads;
  const std::int64_t most = units >= processors() ? 0 : 2 * processors() + units;
  // As the engine pads them.
  const auto padded = [&](std::int64_t dim) {
    const std::int64_t block = std::max(key_dim, value_dim) <= 64 ? 64 : 128;
    return (dim + block - 1) / block * block;
  };
  return 4 * most * padded(key_dim) * padded(value_dim);
}

}  // namespace everlong::lightning
