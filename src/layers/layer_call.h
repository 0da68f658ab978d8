// What every mixer does with a call before its own work: checks, and angles of the call's
// positions.
#pragma once
#include <span>
#include <string_view>

#include "layers/mixer.h"
#include "ops/rope.h"

namespace everlong {

// Throws c10::ValueError, beginning with the room's name, where x is not [B, T, hidden_size] with
// B > 0, the offsets do not fit it, or a state is not the layer's own (`owned`) or of another
// number of sequences.
void check_layer_call(std::string_view room, const at::Tensor& x_BTD, std::int64_t hidden_size,
                      const Sequences& sequences, const State* state, bool owned);

// The same, for layers whose states are of one class: the state as that class, or null.
template <class Own>
Own* own_state_of(std::string_view room, const at::Tensor& x_BTD, std::int64_t hidden_size,
                  const Sequences& sequences, State* state) {
  auto* own = dynamic_cast<Own*>(state);
  check_layer_call(room, x_BTD, hidden_size, sequences, state, own != nullptr);
  return own;
}

// Angles of the tokens of a call, counted from the state's positions (null: from 0). Rows without
// offsets share one table where they share their position.
RopeTable rope_of_call(const at::Tensor& x_BTD, const Sequences& sequences, const State* state,
                       std::span<const double> frequencies, RopePairs pairs);

}  // namespace everlong
