// Projections and norms with biases, as the published encoder-decoder family (torchscale) has them.
#pragma once
#include <torch/nn/module.h>

namespace everlong {

// y = x W^T + b. Parameters "weight" [outputs, inputs] from N(0, gain^2 / inputs) by torch's global
// generator, and, unless `biased` is false, "bias" [outputs], initially 0.
class AffineLinear : public torch::nn::Module {
 public:
  AffineLinear(std::int64_t inputs, std::int64_t outputs, bool biased = true, double gain = 1.0);
  at::Tensor forward(const at::Tensor& x) const;  // [.., inputs] -> [.., outputs]
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor weight_, bias_;
};

// LayerNorm with "weight" [size], initially 1, and "bias" [size], initially 0. fp32 inside (fp64
// stays fp64).
class AffineNorm : public torch::nn::Module {
 public:
  AffineNorm(std::int64_t size, double eps);
  at::Tensor forward(const at::Tensor& x) const;  // any shape [.., size] -> the same

 private:
  double eps_;
  at::Tensor weight_, bias_;
};

}  // namespace everlong
