// The CUDA kernels of this room on torch tensors. Included by op.cpp.
#pragma once
#include <optional>
#include <string>

#include "mechanisms/lightning/op.h"

namespace everlong::lightning {

// decay_linear_attention() for T >= 1 by a kernel; arguments checked by the caller. Nothing where
// no kernel fits: other devices and GPUs, dtypes, dims, and for several tokens what
// why_not_engine() says.
std::optional<Attention> try_cuda(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                                  const at::Tensor& v_BTHV, const Decay& decay,
                                  at::IntArrayRef cu_seqlens,
                                  const std::optional<at::Tensor>& state_NHKV);

// Why calls of several tokens do not run on Hopper's chunk engine; empty: they do.
std::string why_not_engine(at::Device device, at::ScalarType dtype, std::int64_t heads,
                           std::int64_t key_dim, std::int64_t value_dim);

}  // namespace everlong::lightning
