// The CPU kernel (kernel.h) on torch tensors. op.cpp chooses it.
#pragma once
#include "mechanisms/lightning/op.h"

namespace everlong::lightning {

// Whether the kernel can run these: fp32 or bf16 on the CPU, key and value dims up to 256.
Status check_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                        const at::Tensor& v_BTHV);

// As decay_linear_attention(), for arguments that check_arguments() and check_cpu_kernel() pass and
// T >= 1. Differentiable once; the backward pass keeps q, k, v and the initial state alone.
Attention attention_by_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                                  const at::Tensor& v_BTHV, const Decay& decay,
                                  at::IntArrayRef cu_seqlens,
                                  const std::optional<at::Tensor>& state_NHKV);

}  // namespace everlong::lightning
