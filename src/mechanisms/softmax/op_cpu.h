// The CPU kernel as a differentiable operator. op.h chooses it.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>

#include "core/status.h"

namespace everlong::softmax {

// Whether the kernel can run these: fp32 or bf16 on the CPU, dims up to 256.
Status check_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                        const at::Tensor& v_BSGV);

// Tensors as in op.h, of shapes that fit and that check_cpu_kernel passes. No offsets: each row is
// a sequence. Memory beside the result: forward O(threads), backward that of dq in fp32 some times.
at::Tensor attention_by_cpu_kernel(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                                   const at::Tensor& v_BSGV, std::span<const std::int64_t> offsets,
                                   std::int64_t window, double scale);

}  // namespace everlong::softmax
