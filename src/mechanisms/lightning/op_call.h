// Calls of "decay_linear_attention" by name, as the laws, golden_check and the benchmark make them.
#pragma once
#include <string_view>

#include "ops/operator.h"

namespace everlong::lightning {

// One of the operator's forms (op_operator.cpp lists them) on a call of inputs q, k, v, slope and
// state S. params: scale; silu, the letters of the inputs that it turns ("qk"); row_squares,
// whether they are wanted as an output of that name. Refuses bad input before any work. Thread
// safe.
Result<OpResult> run_form(std::string_view form, const OpCall& call);

}  // namespace everlong::lightning
