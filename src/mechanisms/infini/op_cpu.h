// The CPU kernel as differentiable operators. op.h chooses it.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>

#include "core/status.h"

namespace everlong::infini {

// Whether the kernel can run these: fp32 or bf16 on the CPU, dims up to 256.
Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// P segments of C tokens: q [P, C, H, K], local attention [P, C, H, V], the memory before each M
// [P, G, K, V], z [P, G, K], gate fp32 [H, V] -> [P, C, H, V]. bypass: an empty memory gives
// `local`.
at::Tensor read_by_cpu_kernel(const at::Tensor& q_PCHK, const at::Tensor& local_PCHV,
                              const at::Tensor& M_PGKV, const at::Tensor& z_PGK,
                              const at::Tensor& gate_HV, bool bypass);

// What each segment writes by the linear rule, fp32: M [P, G, K, V] and z [P, G, K]. weight [P, C]
// or undefined.
std::pair<at::Tensor, at::Tensor> write_by_cpu_kernel(const at::Tensor& k_PCGK,
                                                      const at::Tensor& v_PCGV,
                                                      const at::Tensor& weight_PC);

}  // namespace everlong::infini
