// y = x W^T without bias: the one projection that the published blocks use.
#pragma once
#include <torch/nn/module.h>

#include <memory>

namespace everlong {

// Parameter "weight" [outputs, inputs], drawn from N(0, 1 / inputs) by torch's global generator.
class Linear : public torch::nn::Module {
 public:
  // `gain` multiplies the standard deviation.
  Linear(std::int64_t inputs, std::int64_t outputs, double gain = 1.0);
  at::Tensor forward(const at::Tensor& x) const;  // [.., inputs] -> [.., outputs]
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor weight_;
};

// Gain of the projections that write into the residual stream: each of the 2 num_layers of them
// adds its variance.
double residual_gain(std::int64_t num_layers);  // 1 / sqrt(2 num_layers)

}  // namespace everlong
