// The ten laws, as functions that return what they found broken. conformance.cpp runs them over the
// registry and expects nothing; planted_faults.cpp runs them over rooms with a fault and expects
// something.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "layers/mixer.h"
#include "mechanisms/mechanism.h"
#include "ops/operator.h"

namespace everlong::laws {

using Violations = std::vector<std::string>;

// Of an operator. Every form that the operator offers on `device` is held to each law.
Violations forms_agree(const Operator& op, at::Device device);  // 1
Violations any_split_is_one_pass(const Operator& op,
                                 at::Device device);  // 2: outputs, states, gradients
Violations packed_is_one_by_one(const Operator& op,
                                at::Device device);  // 2, across sequences; NaN stays at home
Violations gradients_agree(const Operator& op, at::Device device);                 // 4
Violations poison_is_overwritten(const Operator& op, at::Device device);           // 5
Violations same_input_same_bits(const Operator& op, at::Device device);            // 7
Violations bad_calls_are_refused(const Operator& op, at::Device device);           // 8
Violations awkward_lengths_and_strides(const Operator& op, at::Device device);     // 9
Violations more_than_2_to_the_31_elements(const Operator& op, at::Device device);  // 9, slow
Violations past_ignores_future(const Operator& op, at::Device device);             // 10

// Of a layer: `make` builds it anew with the same weights.
struct LayerCase {
  std::string name;
  std::int64_t hidden_size = 0;
  bool bounded_state = true;
  std::function<std::shared_ptr<Mixer>()> make;
};
LayerCase layer_case(const Mechanism& room, at::Device device);

Violations layer_split(const LayerCase& layer,
                       at::Device device);  // 2, with gradients through the state
Violations layer_ragged(const LayerCase& layer,
                        at::Device device);  // 2, sequences of different lengths
Violations state_stays_in_bound(const LayerCase& layer, at::Device device);  // 3
Violations state_goes_on(const LayerCase& layer,
                         at::Device device);             // 6: restore, fork, reset; 8 for states
Violations settings_are_checked(const Mechanism& room);  // 8
Violations layer_past_ignores_future(const LayerCase& layer,
                                     at::Device device);  // 10; NaN stays in its sequence

}  // namespace everlong::laws
