// The attention kernel as a differentiable operator.
#pragma once
#include <ATen/core/Tensor.h>

#include "core/status.h"

namespace everlong::megalodon {

// fp32 or bf16 on the CPU, keys of up to 256.
Status check_attention_kernel(const at::Tensor& q_RTHK);

// q [R, T, H, K] are the last of k [R, S, H, K]; v [R, S, H, V] -> [R, T, H, V]. T >= 1.
at::Tensor attend_by_cpu_kernel(const at::Tensor& q_RTHK, const at::Tensor& k_RSHK,
                                const at::Tensor& v_RSHV);

}  // namespace everlong::megalodon
