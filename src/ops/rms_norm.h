// Root-mean-square normalisation over the last dimension, with and without a learned scale.
// Sources: RMSNorm (1910.07467) eq. 4; SRMSNorm (TransNormerLLM, 2307.14995) eq. 14, which drops
// the weight.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

// y = x * rsqrt(mean(x^2) + eps) * weight in the dtype of x; fp64 in fp64, every other dtype in
// fp32 inside. weight [D], or undefined for none. Differentiable once in x and weight; keeps x and
// one number a row for it.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace everlong
