// The tokens of one call, sorted by where the sequences that take them stand.
#pragma once
#include <cstdint>
#include <vector>

#include "layers/mixer.h"
#include "layers/state.h"

namespace everlong {

// Neighbouring sequences at one position with as many new tokens each, handled together.
struct StatePart {
  std::int64_t first = 0, count = 0;  // sequences
  // Where their tokens lie: rows [row, row + count) of the batch from `token` on.
  std::int64_t row = 0, token = 0, tokens = 0, position = 0;

  // [count, tokens, ...], a view; undefined where x is.
  at::Tensor tokens_of(const at::Tensor& x_BT) const;
};

// `tokens` is the call's T, over which packed sequences lie one behind the other.
std::vector<StatePart> state_parts(const State& state, std::int64_t tokens,
                                   const Sequences& sequences);

// Moves the positions on by what the parts took.
void move_on(State& state, const std::vector<StatePart>& parts);

}  // namespace everlong
