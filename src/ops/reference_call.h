// Between calls and torch-free float64 references: tensors become vectors of doubles and back.
#pragma once
#include <string_view>
#include <vector>

#include "ops/operator.h"

namespace everlong {

// The elements in row-major order. An undefined tensor has none.
std::vector<double> to_doubles(const at::Tensor& x);
at::Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef sizes);

// The incoming gradient of an output ("o") or a final state ("state.S"), empty where the call has
// none. kInvalidArgument when its shape is another.
Result<std::vector<double>> incoming_gradient(const OpCall& call, const std::string& name,
                                              at::IntArrayRef sizes, std::string_view room);

// kUnsupported unless x is fp64 on the CPU, which is what references take.
Status require_reference_input(const at::Tensor& x, std::string_view room, std::string_view form);

// Sequences of a shape: of the packed line, or the rows of the batch.
std::int64_t sequences_of(const OpShape& shape);

}  // namespace everlong
