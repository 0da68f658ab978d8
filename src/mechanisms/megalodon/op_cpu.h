// The CPU kernel as a differentiable operator. op.h chooses it.
#pragma once
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {

// fp32 or bf16 on the CPU.
Status check_cpu_kernel(const at::Tensor& x_BTD);

// The norm (null: none) and the average (null: none) in one pass; what is absent of the result is
// undefined. Weights and states of any floating dtype.
struct NormWeights {
  at::Tensor weight_D, bias_D;
  double eps = kNormEps;
};
NormAveraged norm_cema_by_cpu_kernel(const at::Tensor& x_BTD, const NormWeights* norm,
                                     const EmaWeights* average, Offsets offsets,
                                     const NormState& state, const at::Tensor& h_NDM2);

}  // namespace everlong::megalodon
