// How layers make their weights, so that a model can also be built without drawing or holding them.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

enum class WeightInit {
  kDrawn,     // initialised, as training needs it
  kUnfilled,  // memory that nobody has touched (so it takes no pages yet), for a loader's own
              // values
  kMeta,      // shapes without memory, on the meta device: counting, and checks before a load
};

// While it lives, weights made on this thread are of this kind. Scopes nest.
class WeightInitScope {
 public:
  explicit WeightInitScope(WeightInit init);
  ~WeightInitScope();
  WeightInitScope(const WeightInitScope&) = delete;
  WeightInitScope& operator=(const WeightInitScope&) = delete;

 private:
  WeightInit outer_;
};

// fp32 weights for register_parameter. Normal: N(0, deviation^2) from torch's global generator.
at::Tensor normal_weight(at::IntArrayRef shape, double deviation);
// The same, cut at `cut` deviations to either side.
at::Tensor truncated_normal_weight(at::IntArrayRef shape, double deviation, double cut);
at::Tensor constant_weight(at::IntArrayRef shape, double value);
// A copy of `values`, for the few weights with a formula of their own. Small: kUnfilled copies too.
at::Tensor weight_from(const at::Tensor& values);

}  // namespace everlong
