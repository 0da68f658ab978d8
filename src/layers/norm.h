// The norms of the published blocks, behind one interface.
#pragma once
#include <torch/nn/module.h>

#include <memory>
#include <string>

#include "core/status.h"

namespace everlong {

// SRMSNorm (TransNormerLLM): x * rsqrt(mean(x^2) + eps) over the last dimension, no weight. fp32
// inside (fp64 stays fp64), the result in the dtype of x.
at::Tensor simple_rms_norm(const at::Tensor& x, double eps);

class Norm : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x) = 0;  // any shape [.., D] -> the same
};

// "srms": no parameters; "rms": one, "weight" [size], initially 1; "layer": LayerNorm with that
// weight and no bias. Other names are refused.
Result<std::shared_ptr<Norm>> make_norm(const std::string& name, std::int64_t size, double eps);

}  // namespace everlong
