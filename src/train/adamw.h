// AdamW (1711.05101): Adam with decoupled weight decay, over named parameters.
//
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   p = p - lr decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// m, v, the gradients' sum and p itself are fp32 when the model's parameters are bf16: an update
// far below bf16's spacing is kept in the fp32 master and shows once it has grown. Otherwise they
// have the parameters' dtype.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "ops/operator.h"

namespace everlong {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay =
      0.1;  // of tensors with two dimensions or more; norm weights, biases and gates keep theirs
  // Parameters whose name ends so move at this multiple of the rate: gates of Infini-attention,
  // which Adam moves by at most the rate a step and which have whole units to go.
  std::vector<std::pair<std::string, double>> rate_factors = {};
};

// Holds handles to the parameters and updates them in place. Not thread safe.
class AdamW {
 public:
  // Parameters of one dtype and device, each with requires_grad.
  AdamW(const std::vector<std::pair<std::string, at::Tensor>>& parameters,
        const AdamWOptions& options);

  // Adds the parameters' .grad to the sum of this step and clears it. Call it after every backward
  // pass: sums over many passes are then fp32 even when the gradients are bf16.
  void take_gradients();
  // Global 2-norm of the summed gradients, scaled to at most `max_norm` (0: only measured). A
  // scalar tensor on the parameters' device, so that nothing waits; not finite when any gradient is
  // not.
  at::Tensor clip_gradients(double max_norm);
  // Updates the parameters from the summed gradients and clears the sums. A parameter without a
  // gradient stays.
  void step(double lr);

  // The gradients' sums by parameter name (handles); a parameter that no loss reached is absent.
  TensorMap gradients() const;
  void clear_gradients();

  // Everything that a resumed run needs, by "<parameter>.exp_avg", ".exp_avg_sq", ".step" and, for
  // bf16 parameters,
  // ".master". Handles, not copies.
  TensorMap tensors() const;
  // Copies values of the same names, dtypes and shapes over its own; refuses, and changes nothing,
  // if they do not fit.
  Status restore(const TensorMap& tensors);

 private:
  struct Slot {
    std::string name;
    at::Tensor parameter;  // the model's
    at::Tensor master;     // fp32 copy, or the parameter itself
    at::Tensor gradient;   // undefined until a backward pass reached it
    at::Tensor exp_avg, exp_avg_sq, step;
    bool decays;
    double rate_factor;
  };
  std::vector<Slot> slots_;
  AdamWOptions options_;
  bool has_masters_ = false;
};

}  // namespace everlong
