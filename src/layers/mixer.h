// The one interface between a decoder and the rooms: a layer that mixes tokens along time.
#pragma once
#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "layers/state.h"

namespace everlong {

// How the tokens of a call divide into sequences. Empty offsets: every row of [B, T, D] is one
// sequence of T tokens. Else B = 1 and sequence n owns tokens [offsets[n], offsets[n+1]); empty
// sequences are legal.
struct Sequences {
  std::vector<std::int64_t> offsets;
  // Tokens that the model's text marks (Landmark Attention: those that close a block), bool [B, T]
  // on the CPU. Undefined: none are named, and a mixer goes by positions. Most mixers do not look.
  at::Tensor marks = {};

  std::int64_t count(std::int64_t batch) const {
    return offsets.empty() ? batch : static_cast<std::int64_t>(offsets.size()) - 1;
  }
  std::int64_t length(std::int64_t sequence, std::int64_t tokens) const {
    return offsets.empty() ? tokens : offsets[sequence + 1] - offsets[sequence];
  }
};

// [B, T, D] -> [B, T, D]. Training, prefill and decode are this one function: any number of tokens
// (0 included) after any number of tokens. With a state, tokens continue its sequences and the
// state moves on (positions too); without one they start fresh and nothing is kept. Differentiable
// in x, in the weights and in the state's tensors.
class Mixer : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) = 0;
  // A fresh state for N sequences on the device of the weights.
  virtual std::unique_ptr<State> make_state(std::int64_t sequences) const = 0;
  // Which code runs on this device, for people who ask why: "composite (ATen)".
  virtual std::string path(at::Device device) const = 0;
};

}  // namespace everlong
