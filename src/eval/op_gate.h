// Is a form right on the very case that is about to be timed? No speed is reported for one that is
// not.
#pragma once
#include <string>

#include "ops/operator.h"

namespace everlong {

struct OpGate {
  double max_rel_error =
      0;  // largest |a - b| over the largest |b|, of outputs, states and gradients
  double allowed = 0;
  std::string against;                                      // "reference, all 64 tokens"
  std::string worst;                                        // the tensor with the largest error
  bool passed() const { return max_rel_error <= allowed; }  // false for NaN
};

// Compares op->run(form, call) with float64. Up to 1024 tokens the whole case runs through the
// reference. Of longer ones the first 1024 tokens do (what comes later cannot touch them), and the
// last 1024 run through the composite form in float64 after the state of all before, where that is
// bearable. Gradients likewise, from incoming gradients on those tokens alone. `call` has grad_out
// by output name when gradients are to be checked.
Result<OpGate> check_op(const Operator& op, std::string_view form, const OpCall& call,
                        std::int64_t tokens, at::ScalarType dtype, double flops);

// The call with floating-point inputs, states and incoming gradients in the dtype and on the device
// that a form runs in: states at least fp32, the operator's host_inputs as they are.
OpCall cast_call(const Operator& op, const OpCall& call, at::ScalarType dtype, at::Device device);
// Tokens [begin, end) of the call, with this state.
OpCall slice_call(const Operator& op, const OpCall& call, std::int64_t begin, std::int64_t end,
                  const TensorMap& state);
// The state after the first `tokens` tokens of the call, which run in this dtype where they lie, in
// pieces.
Result<TensorMap> state_after(const Operator& op, std::string_view form, const OpCall& call,
                              std::int64_t tokens, at::ScalarType dtype);

}  // namespace everlong
