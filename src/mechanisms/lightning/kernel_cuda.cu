// The step of one token: memory-bound, 2 K V fp32 of state a head against 4 K V operations.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>

#include "mechanisms/lightning/kernel_cuda_step.cuh"

namespace everlong::lightning {
namespace {

using namespace step;

struct StepLaunch {
  Rows q, k, v, o;
  States in, out;  // in.data null: zero
  const std::int64_t* slot;
  std::int64_t rows;  // N
  int heads, K, V, column_blocks;
  float scale;
  float slope[kCudaMaxHeads];
};

// CTA: (sequence, head, kColumns columns). Lanes hold kWidth columns each, groups of lanes take the
// key rows in turn.
template <class Element, int kWidth>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepLaunch p) {
  constexpr int kLanes = kColumns / kWidth, kGroups = kThreads / kLanes;
  extern __shared__ float shared[];
  float *q = shared, *k = shared + p.K, *partial = k + p.K;  // [K], [K], [warps, kColumns]

  const int block = blockIdx.x % p.column_blocks, unit = blockIdx.x / p.column_blocks;
  const int head = unit % p.heads, sequence = unit / p.heads;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int column = block * kColumns + lane * kWidth;
  const bool mine = column < p.V;

  const std::int64_t row = p.slot == nullptr ? sequence : p.slot[sequence];
  const std::int64_t o_at = sequence * p.o.sequence + head * p.o.head;
  Element* o = static_cast<Element*>(const_cast<void*>(p.o.data)) + o_at;
  if (row < 0 || row >= p.rows) {
    const int mine_alone = block * kColumns + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kColumns && mine_alone < p.V) o[mine_alone] = Element(0.0f);
    return;
  }

  const std::int64_t q_at = sequence * p.q.sequence + head * p.q.head;
  const std::int64_t k_at = sequence * p.k.sequence + head * p.k.head;
  const std::int64_t v_at = sequence * p.v.sequence + head * p.v.head;
  // The state moves by what it loses, expm1: a decay of 4e-8 a token is not rounded away.
  const float lost = expm1f(-p.slope[head]);
  const float* in =
      p.in.data == nullptr ? nullptr : p.in.data + row * p.in.row + head * p.in.head + column;
  float* out = p.out.data + row * p.out.row + head * p.out.head + column;

  if (!mine) in = nullptr;
  Words<kWidth> state[kRowsInFlight];
  fetch(state, in, p.in.key, group, p.K);  // in flight while q and k are staged
  for (int i = threadIdx.x; i < p.K; i += kThreads) {
    q[i] = load<Element>(p.q, q_at + i);
    k[i] = load<Element>(p.k, k_at + i);
  }
  Words<kWidth> v{}, sum{};
  if (mine)
#pragma unroll
    for (int c = 0; c < kWidth; ++c) v.at[c] = load<Element>(p.v, v_at + column + c);
  __syncthreads();

  for (int first = group; first < p.K; first += kRowsInFlight * kGroups) {
    if (first != group) fetch(state, in, p.in.key, first, p.K);
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int r = first + i * kGroups;
      if (r >= p.K) break;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        state[i].at[c] += fmaf(state[i].at[c], lost, k[r] * v.at[c]);
        sum.at[c] = fmaf(q[r], state[i].at[c], sum.at[c]);
      }
      if (mine) *reinterpret_cast<Words<kWidth>*>(out + r * p.out.key) = state[i];
    }
  }

  const float total = sum_of_groups<kThreads>(sum, partial);
  const int last = block * kColumns + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kColumns && last < p.V) o[last] = Element(total * p.scale);
}

template <class Element>
cudaError_t launch(const StepLaunch& p, bool wide, std::int64_t blocks, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(blocks);
  const std::size_t shared = sizeof(float) * (2 * static_cast<std::size_t>(p.K) + kPartials);
  if (wide)
    step_kernel<Element, 4><<<grid, kThreads, shared, stream>>>(p);
  else
    step_kernel<Element, 1><<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

bool is(const std::array<std::int64_t, 4>& sizes, std::int64_t a, std::int64_t b, std::int64_t c,
        std::int64_t d) {
  return sizes == std::array<std::int64_t, 4>{a, b, c, d};
}

Status validate(const CudaStep& call) {
  const auto [B, T, H, K] = call.q_B1HK.sizes;
  const std::int64_t V = call.v_B1HV.sizes[3], N = call.state_out_NHKV.sizes[0];
  const DType dtype = call.q_B1HK.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16)
    return unsupported("lightning: the CUDA step takes fp32, bf16 and fp16; given ",
                       info(dtype).name);
  if (call.k_B1HK.dtype != dtype || call.v_B1HV.dtype != dtype || call.o_B1HV.dtype != dtype)
    return invalid_argument("lightning: q, k, v and o of a CUDA step must have one dtype");
  if (T != 1 || B < 0 || !is(call.k_B1HK.sizes, B, 1, H, K) || !is(call.v_B1HV.sizes, B, 1, H, V) ||
      !is(call.o_B1HV.sizes, B, 1, H, V))
    return invalid_argument(
        "lightning: a CUDA step takes q, k [B, 1, H, K] and v, o [B, 1, H, V]; q is [", B, ", ", T,
        ", ", H, ", ", K, "], V is ", V);
  if (H < 1 || H > kCudaMaxHeads || K < 1 || K > kCudaMaxKeyDim || V < 1 || V > (1 << 20))
    return unsupported("lightning: the CUDA step takes up to ", kCudaMaxHeads,
                       " heads and key dims up to ", kCudaMaxKeyDim, "; given H = ", H, ", K = ", K,
                       ", V = ", V);
  if (call.state_out_NHKV.dtype != DType::kFloat32 || !is(call.state_out_NHKV.sizes, N, H, K, V) ||
      (call.state_in_NHKV &&
       (call.state_in_NHKV.dtype != DType::kFloat32 || !is(call.state_in_NHKV.sizes, N, H, K, V))))
    return invalid_argument("lightning: the states of a CUDA step are fp32 [N, H, K, V] with H = ",
                            H, ", K = ", K, ", V = ", V);
  if (call.slot_B == nullptr && N != B)
    return invalid_argument("lightning: ", N, " states for ", B,
                            " sequences; without slots there is one for each");
  if (static_cast<std::int64_t>(call.slope_H.size()) != H)
    return invalid_argument("lightning: ", call.slope_H.size(), " slopes for ", H, " heads");
  const auto dense = [](const auto& x) { return !x || x.strides[3] == 1 || x.sizes[3] == 1; };
  if (!dense(call.q_B1HK) || !dense(call.k_B1HK) || !dense(call.v_B1HV) || !dense(call.o_B1HV) ||
      !dense(call.state_in_NHKV) || !dense(call.state_out_NHKV))
    return invalid_argument("lightning: the last dimension of every tensor must be contiguous");
  if (B > 0 &&
      (!call.q_B1HK || !call.k_B1HK || !call.v_B1HV || !call.o_B1HV || !call.state_out_NHKV))
    return invalid_argument("lightning: q, k, v, o and state_out of a CUDA step must be there");
  return {};
}

}  // namespace

Status cuda_step(const CudaStep& call, void* stream) {
  EVERLONG_RETURN_IF_ERROR(validate(call));
  const std::int64_t B = call.q_B1HK.sizes[0], H = call.q_B1HK.sizes[2];
  if (B == 0) return {};
  StepLaunch p;
  p.q = rows_of(call.q_B1HK);
  p.k = rows_of(call.k_B1HK);
  p.v = rows_of(call.v_B1HV);
  p.o = rows_of(call.o_B1HV);
  p.in = states_of(call.state_in_NHKV);
  p.out = states_of(call.state_out_NHKV);
  p.slot = call.slot_B;
  p.rows = call.state_out_NHKV.sizes[0];
  p.heads = static_cast<int>(H);
  p.K = static_cast<int>(call.q_B1HK.sizes[3]);
  p.V = static_cast<int>(call.v_B1HV.sizes[3]);
  p.column_blocks = (p.V + kColumns - 1) / kColumns;
  p.scale = static_cast<float>(call.scale);
  std::transform(call.slope_H.begin(), call.slope_H.end(), p.slope,
                 [](double slope) { return static_cast<float>(slope); });
  const std::int64_t blocks = B * H * p.column_blocks;
  if (blocks > INT32_MAX)
    return unsupported("lightning: ", B, " sequences of ", H,
                       " heads are too many for one CUDA step; split the batch");

  const bool wide = is_wide(call.state_in_NHKV) && is_wide(call.state_out_NHKV);
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  switch (call.q_B1HK.dtype) {
    case DType::kFloat32:
      error = launch<float>(p, wide, blocks, on);
      break;
    case DType::kBFloat16:
      error = launch<__nv_bfloat16>(p, wide, blocks, on);
      break;
    default:
      error = launch<__half>(p, wide, blocks, on);
  }
  if (error == cudaSuccess) return {};
  return unsupported("lightning: the CUDA step could not be launched: ", cudaGetErrorString(error));
}

}  // namespace everlong::lightning
