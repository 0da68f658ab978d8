// Layers with trained gates that training must watch: gates that do not move decide nothing.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

class Gated {
 public:
  virtual ~Gated() = default;
  // The gates' values in [0, 1], fp32, one dimension; no gradient.
  virtual at::Tensor gate_values() const = 0;
};

}  // namespace everlong
