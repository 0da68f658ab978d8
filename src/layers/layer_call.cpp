#include "layers/layer_call.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/offsets.h"
#include "ops/operator.h"

namespace everlong {

void check_layer_call(std::string_view room, const at::Tensor& x_BTD, std::int64_t hidden_size,
                      const Sequences& sequences, const State* state, bool owned) {
  TORCH_CHECK_VALUE(x_BTD.dim() == 3 && x_BTD.size(2) == hidden_size && x_BTD.size(0) > 0, room,
                    ": x has shape ", x_BTD.sizes(), "; [B, T, ", hidden_size, "] is needed");
  throw_if_error(check_offsets(sequences.offsets, x_BTD.size(0), x_BTD.size(1)).at(room));
  if (state == nullptr) return;
  TORCH_CHECK_VALUE(owned, room,
                    ": the state is of another mechanism; take it from this layer's make_state");
  const std::int64_t count = sequences.count(x_BTD.size(0));
  TORCH_CHECK_VALUE(state->sequences() == count, room, ": a state of ", state->sequences(),
                    " sequences for a call of ", count);
}

RopeTable rope_of_call(const at::Tensor& x_BTD, const Sequences& sequences, const State* state,
                       std::span<const double> frequencies, RopePairs pairs) {
  const std::int64_t batch = x_BTD.size(0), tokens = x_BTD.size(1);
  std::vector<std::int64_t> starts(static_cast<std::size_t>(sequences.count(batch)), 0);
  if (state != nullptr) starts = state->positions();
  if (sequences.offsets.empty() &&
      std::ranges::all_of(starts, [&](auto p) { return p == starts.front(); }))
    starts.resize(1);
  std::vector<std::int64_t> positions;
  for (std::size_t n = 0; n < starts.size(); ++n)
    for (std::int64_t t = 0; t < sequences.length(static_cast<std::int64_t>(n), tokens); ++t)
      positions.push_back(starts[n] + t);
  const std::int64_t tables =
      sequences.offsets.empty() ? static_cast<std::int64_t>(starts.size()) : 1;
  return make_rope_table(positions, tables, frequencies, pairs, x_BTD.scalar_type(),
                         x_BTD.device());
}

}  // namespace everlong
