#include "layers/weights.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <cmath>

namespace everlong {
namespace {

thread_local WeightInit current = WeightInit::kDrawn;

// Not at::empty: with deterministic algorithms asked for, that one fills what it allocates.
at::Tensor unfilled(at::IntArrayRef shape) {
  if (current == WeightInit::kMeta)
    return at::empty(shape, at::TensorOptions().dtype(at::kFloat).device(at::kMeta));
  return at::detail::empty_cpu(shape, at::kFloat);
}

}  // namespace

WeightInitScope::WeightInitScope(WeightInit init) : outer_(current) { current = init; }

WeightInitScope::~WeightInitScope() { current = outer_; }

at::Tensor normal_weight(at::IntArrayRef shape, double deviation) {
  at::Tensor weight = unfilled(shape);
  return current == WeightInit::kDrawn ? weight.normal_(0, deviation) : weight;
}

at::Tensor truncated_normal_weight(at::IntArrayRef shape, double deviation, double cut) {
  at::Tensor weight = unfilled(shape);
  if (current != WeightInit::kDrawn) return weight;
  // The inverse of the normal's distribution, from as much of it as lies between the cuts. fp32
  // rounds numbers next to the edges up to 1, hence the clamp.
  const double edge = std::erf(cut / std::sqrt(2.0));
  return weight.uniform_(-edge, edge)
      .erfinv_()
      .mul_(std::sqrt(2.0) * deviation)
      .clamp_(-cut * deviation, cut * deviation);
}

at::Tensor constant_weight(at::IntArrayRef shape, double value) {
  at::Tensor weight = unfilled(shape);
  return current == WeightInit::kDrawn ? weight.fill_(value) : weight;
}

at::Tensor weight_from(const at::Tensor& values) {
  at::Tensor weight = unfilled(values.sizes());
  return current == WeightInit::kMeta ? weight : weight.copy_(values);
}

}  // namespace everlong
