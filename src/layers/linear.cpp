#include "layers/linear.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "layers/weights.h"

namespace everlong {

Linear::Linear(std::int64_t inputs, std::int64_t outputs, double gain) {
  const double deviation = gain / std::sqrt(static_cast<double>(std::max<std::int64_t>(inputs, 1)));
  weight_ = register_parameter("weight", normal_weight({outputs, inputs}, deviation));
}

at::Tensor Linear::forward(const at::Tensor& x) const { return at::linear(x, weight_); }

double residual_gain(std::int64_t num_layers) {
  return 1.0 / std::sqrt(2.0 * static_cast<double>(std::max<std::int64_t>(num_layers, 1)));
}

}  // namespace everlong
