// The CPU kernel as a differentiable operator. op.h chooses it.
#pragma once
#include <ATen/core/Tensor.h>

#include "core/status.h"
#include "mechanisms/longnet/op.h"

namespace everlong::longnet {

// Whether the kernel can run these: fp32 or bf16 on the CPU, dims up to 256, no XPos.
Status check_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                        const at::Tensor& v_BTGV, const Options& options);

// Tensors as in op.h, of shapes that fit and that check_cpu_kernel passes.
at::Tensor attention_by_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                                   const at::Tensor& v_BTGV, const Options& options, double scale,
                                   const Past& past);

}  // namespace everlong::longnet
