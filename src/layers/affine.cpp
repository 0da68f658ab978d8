#include "layers/affine.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "layers/weights.h"

namespace everlong {

AffineLinear::AffineLinear(std::int64_t inputs, std::int64_t outputs, bool biased, double gain) {
  const double deviation = gain / std::sqrt(static_cast<double>(std::max<std::int64_t>(inputs, 1)));
  weight_ = register_parameter("weight", normal_weight({outputs, inputs}, deviation));
  if (biased) bias_ = register_parameter("bias", constant_weight({outputs}, 0));
}

at::Tensor AffineLinear::forward(const at::Tensor& x) const {
  return at::linear(x, weight_, bias_.defined() ? std::optional(bias_) : std::nullopt);
}

AffineNorm::AffineNorm(std::int64_t size, double eps)
    : eps_(eps),
      weight_(register_parameter("weight", constant_weight({size}, 1))),
      bias_(register_parameter("bias", constant_weight({size}, 0))) {}

at::Tensor AffineNorm::forward(const at::Tensor& x) const {
  return at::layer_norm(x, {weight_.size(0)}, weight_, bias_, eps_);
}

}  // namespace everlong
