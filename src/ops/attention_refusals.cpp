#include "ops/attention_refusals.h"

#include <ATen/ATen.h>

namespace everlong {

AttentionRefusals::AttentionRefusals(const Operator& op) : op_(op) {
  add("heads_not_a_multiple", plain,
      [](OpCall& c) { c.inputs["q"] = c.inputs["q"].narrow(2, 0, 3); });
  add("key_dims_differ", plain, [](OpCall& c) { c.inputs["q"] = c.inputs["q"].narrow(3, 0, 8); });
  add("tokens_differ", plain, [](OpCall& c) { c.inputs["k"] = c.inputs["k"].narrow(1, 0, 5); });
  add("three_dimensions", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].select(0, 0); });
  add("value_heads_differ", plain,
      [](OpCall& c) { c.inputs["v"] = c.inputs["v"].narrow(2, 0, 1); });
  add("mixed_dtypes", plain, [](OpCall& c) { c.inputs["k"] = c.inputs["k"].to(at::kFloat); });
  add("integers", plain, [](OpCall& c) {
    for (auto& [name, x] : c.inputs) x = x.to(at::kLong);
  });
  add("input_missing", plain, [](OpCall& c) { c.inputs.erase("v"); });
  add("input_unknown", plain, [](OpCall& c) { c.inputs["slope"] = c.inputs["q"]; });
  add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
  add("offsets_past_the_end", packed, [](OpCall& c) { c.cu_seqlens = {0, 2, 7}; });
  add("offsets_short_of_the_end", packed, [](OpCall& c) { c.cu_seqlens = {0, 2, 5}; });
  add("offsets_start_late", packed, [](OpCall& c) { c.cu_seqlens = {1, 6}; });
  add("offsets_with_a_batch", two, [](OpCall& c) { c.cu_seqlens = {0, 6}; });
  add("state_of_another_batch", carried, [this](OpCall& c) {
    c.state = op_.sample({.batch = 2, .tokens = 6, .initial_state = true}).state;
  });
}

void AttentionRefusals::add(const char* name, const OpShape& shape, const Change& change) {
  OpCall call = op_.sample(shape);
  change(call);
  list_.emplace_back(name, std::move(call));
}

}  // namespace everlong
