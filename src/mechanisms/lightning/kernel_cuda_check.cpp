#include "mechanisms/lightning/kernel_cuda_check.h"

#include <algorithm>
#include <array>

namespace everlong::lightning {

std::int64_t CudaTensors::sequences() const {
  const auto cu = packing.cu_seqlens;
  return cu.empty() ? q_BTHK.sizes[0] : static_cast<std::int64_t>(cu.size()) - 1;
}

Status check(const CudaTensors& call) {
  using Sizes = std::array<std::int64_t, 4>;
  const auto [B, T, H, K] = call.q_BTHK.sizes;
  const std::int64_t V = call.v_BTHV.sizes[3], N = call.sequences();
  const auto cu = call.packing.cu_seqlens;
  if (H < 1 || H > kCudaMaxHeads)
    return unsupported("lightning: the CUDA kernels take up to ", kCudaMaxHeads, " heads; given ",
                       H);
  if (B < 1 || T < 1 || call.k_BTHK.sizes != call.q_BTHK.sizes ||
      call.v_BTHV.sizes != Sizes{B, T, H, V})
    return invalid_argument(
        "lightning: the CUDA kernels take q, k [B, T, H, K] and v [B, T, H, V] of at least one "
        "token");
  const auto is_like = [](const ConstTensorView& model) {
    return [&](const ConstTensorView& x) {
      return x && x.sizes == model.sizes && x.dtype == model.dtype;
    };
  };
  if (!call.q_BTHK || !is_like(call.q_BTHK)(call.k_BTHK) || !call.v_BTHV ||
      call.v_BTHV.dtype != call.q_BTHK.dtype ||
      !std::ranges::all_of(call.like_q, is_like(call.q_BTHK)) ||
      !std::ranges::all_of(call.like_v, is_like(call.v_BTHV)))
    return invalid_argument(
        "lightning: q, k and v have one dtype, outputs and gradients the shapes of what they "
        "belong to");
  for (const ConstTensorView& state : call.states_NHKV)
    if (state && (state.dtype != DType::kFloat32 || state.sizes != Sizes{N, H, K, V}))
      return invalid_argument("lightning: states are fp32 [N, H, K, V], N the sequences");
  if (static_cast<std::int64_t>(call.slope_H.size()) != H)
    return invalid_argument("lightning: ", call.slope_H.size(), " slopes for ", H, " heads");
  if (!cu.empty() && (B != 1 || cu.front() != 0 || cu.back() != T || !std::ranges::is_sorted(cu) ||
                      call.packing.offsets == nullptr))
    return invalid_argument(
        "lightning: packed sequences lie in B = 1 with offsets that rise from 0 to T, here and on "
        "the device");
  constexpr std::int64_t kMost = INT32_MAX / 2;
  if (T > kMost || B > kMost / H || N > kMost / H)
    return unsupported("lightning: ", N, " sequences of ", T, " tokens and ", H,
                       " heads are too many for one call; split the batch");
  return {};
}

}  // namespace everlong::lightning
