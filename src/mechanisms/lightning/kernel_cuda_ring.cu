// One token with the states written behind: host side of kernel_cuda_ring.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>

#include "mechanisms/lightning/kernel_cuda_ring.cuh"

namespace everlong::lightning {
namespace {

template <class Element, int kColumns>
cudaError_t launch(const ring::Launch& p, std::int64_t B, std::int64_t H, void* stream) {
  const auto kernel = ring::ring_kernel<Element, kColumns>;
  const int bytes = ring::Worker<Element, kColumns>::bytes(p.K, p.ring);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      error != cudaSuccess)
    return error;
  const dim3 grid(static_cast<unsigned>(B), static_cast<unsigned>(H),
                  static_cast<unsigned>((p.V + kColumns - 1) / kColumns));
  kernel<<<grid, 2 * kColumns, static_cast<std::size_t>(bytes),
           static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
// A whole state a block where it is small enough; else, and where a block's rows would not fit a
// smaller GPU, 64 columns.
template <class Element>
cudaError_t launch(const ring::Launch& p, std::int64_t B, std::int64_t H, void* stream) {
  constexpr int kSmallest = 99 * 1024;
  if (p.V > 64 && ring::Worker<Element, 128>::bytes(p.K, p.ring) <= kSmallest)
    return launch<Element, 128>(p, B, H, stream);
  return launch<Element, 64>(p, B, H, stream);
}

Status validate(const CudaRingStep& call) {
  using Sizes = std::array<std::int64_t, 4>;
  const auto [N, H, K, V] = call.state_NHKV.sizes;
  const std::int64_t R = call.keys_NHRK.sizes[2],
                     B = call.q_B1HK ? call.q_B1HK.sizes[0] : call.batch;
  const DType dtype = call.keys_NHRK.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16)
    return unsupported("lightning: the CUDA step takes fp32, bf16 and fp16; given ",
                       info(dtype).name);
  if (!call.state_NHKV || call.state_NHKV.dtype != DType::kFloat32 || !call.keys_NHRK ||
      !call.values_NHRV || call.values_NHRV.dtype != dtype || call.waiting_N == nullptr ||
      call.keys_NHRK.sizes != Sizes{N, H, R, K} || call.values_NHRV.sizes != Sizes{N, H, R, V})
    return invalid_argument(
        "lightning: a step with rings takes a state [N, H, K, V] in fp32, rings [N, H, R, K] and "
        "[N, H, R, V] in the dtype of k, and the tokens that wait in them");
  if (R < 1 || R > kCudaMaxRing || K < 1 || K > kCudaRingMaxKeyDim || V < 1 || V > (1 << 16) ||
      H < 1 || H > kCudaMaxHeads)
    return unsupported("lightning: a step with rings takes up to ", kCudaMaxRing,
                       " tokens a ring, ", kCudaMaxHeads, " heads and key dims up to ",
                       kCudaRingMaxKeyDim, "; given R = ", R, ", H = ", H, ", K = ", K);
  const auto is = [dtype](const auto& x, const Sizes& sizes) {
    return x && x.dtype == dtype && x.sizes == sizes;
  };
  if (call.q_B1HK && (!is(call.q_B1HK, {B, 1, H, K}) || !is(call.k_B1HK, {B, 1, H, K}) ||
                      !is(call.v_B1HV, {B, 1, H, V}) || !is(call.o_B1HV, {B, 1, H, V})))
    return invalid_argument(
        "lightning: q, k [B, 1, H, K] and v, o [B, 1, H, V] of a step must have the dtype and dims "
        "of the rings");
  if (B < 0 || B > INT32_MAX || (call.slot_B == nullptr && N != B))
    return invalid_argument("lightning: ", N, " states for ", B,
                            " sequences; without slots there is one for each");
  if (static_cast<std::int64_t>(call.slope_H.size()) != H)
    return invalid_argument("lightning: ", call.slope_H.size(), " slopes for ", H, " heads");
  const auto dense = [](const ConstTensorView& x) {
    return !x || x.strides[3] == 1 || x.sizes[3] == 1;
  };
  for (const ConstTensorView& x :
       {call.q_B1HK, call.k_B1HK, call.v_B1HV, ConstTensorView(call.o_B1HV),
        ConstTensorView(call.state_NHKV), ConstTensorView(call.keys_NHRK),
        ConstTensorView(call.values_NHRV)})
    if (!dense(x))
      return invalid_argument("lightning: the last dimension of every tensor must be contiguous");
  return {};
}

}  // namespace

Status cuda_ring_step(const CudaRingStep& call, void* stream) {
  EVERLONG_RETURN_IF_ERROR(validate(call));
  const auto [N, H, K, V] = call.state_NHKV.sizes;
  const std::int64_t B = call.q_B1HK ? call.q_B1HK.sizes[0] : call.batch;
  if (B == 0) return {};
  const auto ring_of = [](const TensorView& x) {
    return ring::Ring{x.data, x.strides[0], x.strides[1], x.strides[2]};
  };
  ring::Launch p{};
  if (call.q_B1HK) {
    p.q = step::rows_of(call.q_B1HK);
    p.k = step::rows_of(call.k_B1HK);
    p.v = step::rows_of(call.v_B1HV);
    p.o = step::rows_of(call.o_B1HV);
  }
  p.state = step::states_of(call.state_NHKV);
  p.keys = ring_of(call.keys_NHRK);
  p.values = ring_of(call.values_NHRV);
  p.waiting = call.waiting_N;
  p.slot = call.slot_B;
  p.rows = N;
  p.K = static_cast<int>(K);
  p.V = static_cast<int>(V);
  p.ring = static_cast<int>(call.keys_NHRK.sizes[2]);
  p.scale = static_cast<float>(call.scale);
  std::transform(call.slope_H.begin(), call.slope_H.end(), p.slope,
                 [](double slope) { return static_cast<float>(slope); });
  p.wide_state = step::is_wide(call.state_NHKV);
  p.wide_rows = true;
  const auto size = static_cast<std::int64_t>(info(call.keys_NHRK.dtype).bytes);
  for (const ConstTensorView& x :
       {ConstTensorView(call.keys_NHRK), ConstTensorView(call.values_NHRV), call.q_B1HK,
        call.k_B1HK, call.v_B1HV}) {
    p.wide_rows &= reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    p.wide_rows &= x.sizes[3] * size % 16 == 0;
    for (const std::int64_t stride : {x.strides[0], x.strides[1], x.strides[2]})
      p.wide_rows &= stride * size % 16 == 0;
  }
  cudaError_t error = cudaSuccess;
  switch (call.keys_NHRK.dtype) {
    case DType::kFloat32:
      error = launch<float>(p, B, H, stream);
      break;
    case DType::kBFloat16:
      error = launch<__nv_bfloat16>(p, B, H, stream);
      break;
    default:
      error = launch<__half>(p, B, H, stream);
  }
  if (error == cudaSuccess) return {};
  return unsupported("lightning: the CUDA step could not be launched: ", cudaGetErrorString(error));
}

}  // namespace everlong::lightning
