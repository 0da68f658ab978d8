// The CUDA kernels of this room on torch tensors. Included by op.cpp.
#pragma once
#include <optional>
#include <string>

#include "mechanisms/lightning/op.h"

namespace everlong::lightning {

// decay_linear_attention() for T >= 1 by a kernel; arguments checked by the caller. Nothing where
// no kernel fits: other devices and GPUs, fp64, for several tokens dims above 256.
std::optional<Attention> try_cuda(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                                  const at::Tensor& v_BTHV, const Decay& decay,
                                  at::IntArrayRef cu_seqlens,
                                  const std::optional<at::Tensor>& state_NHKV,
                                  const Fusion& fusion);

// Whether try_cuda() takes a fusion.any(): on Hopper's chunk engine, dims up to kCudaMaxFusedDim.
bool takes_fusion(const at::Tensor& q_BTHK, const at::Tensor& v_BTHV, at::IntArrayRef cu_seqlens);

// Why calls of several tokens do not run on Hopper's chunk engine; empty: they do.
std::string why_not_engine(at::Device device, at::ScalarType dtype, std::int64_t heads,
                           std::int64_t key_dim, std::int64_t value_dim);

// Whether they run on the CUDA sweep where they do not run on the engine.
bool takes_cuda_sweep(at::Device device, at::ScalarType dtype, std::int64_t heads,
                      std::int64_t key_dim, std::int64_t value_dim);

// States that are written behind (CudaRingStep in kernel_cuda.h), all on one GPU: state fp32, rings
// in the dtype of k, waiting int32, slots int64 or undefined.
struct Rings {
  at::Tensor state_NHKV, keys_NHRK, values_NHRV, waiting_N, slot_B;
};
// o [B, 1, H, V] of one token a sequence; state and rings change. q undefined: folds all that waits
// into the states and gives nothing. No gradients.
at::Tensor step_with_rings(const at::Tensor& q_B1HK, const at::Tensor& k_B1HK,
                           const at::Tensor& v_B1HV, const Decay& decay, const Rings& rings);

}  // namespace everlong::lightning
