#include "layers/state_parts.h"

#include <ATen/ATen.h>

namespace everlong {

at::Tensor StatePart::tokens_of(const at::Tensor& x_BT) const {
  return x_BT.defined() ? x_BT.narrow(0, row, count).narrow(1, token, tokens) : x_BT;
}

std::vector<StatePart> state_parts(const State& state, std::int64_t tokens,
                                   const Sequences& sequences) {
  std::vector<StatePart> list;
  const bool packed = !sequences.offsets.empty();
  for (std::int64_t n = 0; n < state.sequences(); ++n) {
    const std::int64_t position = state.positions()[static_cast<std::size_t>(n)];
    if (!packed && !list.empty() && list.back().position == position) {
      ++list.back().count;
      continue;
    }
    list.push_back({.first = n,
                    .count = 1,
                    .row = packed ? 0 : n,
                    .token = packed ? sequences.offsets[static_cast<std::size_t>(n)] : 0,
                    .tokens = sequences.length(n, tokens),
                    .position = position});
  }
  return list;
}

void move_on(State& state, const std::vector<StatePart>& parts) {
  for (const StatePart& p : parts)
    for (std::int64_t n = p.first; n < p.first + p.count; ++n)
      state.positions()[static_cast<std::size_t>(n)] += p.tokens;
}

}  // namespace everlong
