#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

#include "layers/weights.h"
#include "mechanisms/lightning/layer.h"

namespace everlong::lightning {

Lrpe::Lrpe(std::int64_t heads, std::int64_t head_dim) {
  const at::Tensor index = at::arange(heads * head_dim, at::kDouble);
  const at::Tensor theta =
      at::exp(index * (-2.0 * std::log(10000.0) / static_cast<double>(heads * head_dim)));
  theta_ = register_parameter("theta", weight_from(theta.view({heads, 1, head_dim})));
}

at::Tensor Lrpe::forward(const at::Tensor& x, const at::Tensor& positions_BT) const {
  // In turns, not radians: what is whole drops out exactly, and only the rest is rounded to fp32.
  const at::Tensor turns =
      positions_BT.to(at::kDouble).unsqueeze(-1).unsqueeze(-1) *
      (theta_.squeeze(1).to(at::kDouble) / (2 * std::numbers::pi));  // [B, T, H, D]
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor angle = (turns - turns.detach().round()).to(dtype) * (2 * std::numbers::pi);
  const at::Tensor rotation =
      at::stack({angle.cos(), angle.sin()}, -2).to(x.scalar_type());  // [B, T, H, 2, D]
  return (x.unsqueeze(-2) * rotation.unsqueeze(2)).flatten(-2);
}

}  // namespace everlong::lightning
