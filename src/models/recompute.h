// Activation checkpointing: memory for time.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "layers/mixer.h"

namespace everlong {

// A block as a function of its input: it moves `state` (may be null) on and returns [B, T, D].
// Called again in the backward pass, it must do the same: no randomness, and nothing read but x,
// the state and the parameters.
using BlockFunction = std::function<at::Tensor(const at::Tensor& x_BTD, State* state)>;

// block(x, state) with none of its activations kept: the backward pass runs it again from copies of
// what went in. Gradients in x, in `parameters` (all that the block uses) and in the state's
// tensors are those of the plain call.
at::Tensor recomputed(const BlockFunction& block, const at::Tensor& x_BTD, State* state,
                      const std::vector<at::Tensor>& parameters);

}  // namespace everlong
