// What the operators of this room ask of an OpCall alike: names, dtypes, and tokens that are not
// there or begin a document.
#pragma once
#include <functional>
#include <set>
#include <span>

#include "ops/operator.h"

namespace everlong::megalodon {

// What one operator takes.
struct CallNames {
  std::vector<std::string> tokens, weights, optional_weights;  // inputs; tokens[0] leads
  std::vector<std::string> token_outputs;
  std::vector<std::string> state;  // all or none
};

// Refuses missing and unknown inputs and states, a first input that is not [B, T, ..] of `dims`
// dimensions, other dtypes and devices among inputs, and offsets that do not fit. A padding_mask
// and reset are let through.
Status check_names(const OpCall& call, const CallNames& names, std::int64_t dims);

// The shape of an input or state tensor; a negative number allows any size.
Status check_shape(const char* name, const at::Tensor& x, at::IntArrayRef wanted);
// A state's tensor of numbers, or of counts.
Status check_state(const OpCall& call, const char* name, at::IntArrayRef wanted,
                   at::ScalarType dtype);

std::int64_t sequences_of(const OpCall& call, const std::string& leading_input);
// int64 [N] >= 0 as numbers; a single one stands for all N.
Result<std::vector<std::int64_t>> read_counts(const at::Tensor& count, std::int64_t sequences);
at::Tensor counts_tensor(const std::vector<std::int64_t>& counts, at::Device device);

// Runs a call whose tokens may be masked (padding_mask) or begin documents (reset): tokens that are
// there become a packed line with a sequence a document, and what comes back is put in place again:
// 0 for masked tokens, the state after the row's last document. A document's fresh state is zeros.
// Calls without either go through unchanged.
using RunCall = std::function<Result<OpResult>(const OpCall& call)>;
Result<OpResult> run_documents(const OpCall& call, const CallNames& names, const RunCall& run);

}  // namespace everlong::megalodon
