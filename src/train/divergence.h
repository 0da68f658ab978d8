// Where numbers that are not finite began, for the message that ends a run.
#pragma once
#include <string>
#include <vector>

#include "train/backprop.h"

namespace everlong {

// Runs the step's batches once more, from fresh states, and looks at weights, at what each layer
// puts out, at the states now carried, and at the gradients' sums, in this order. A sentence such
// as "It began in layer 3 (lightning): what it puts out is not finite, what it takes in is."
std::string where_it_began(Decoder& model, const Backprop& backprop, at::Device device,
                           std::int64_t segment_tokens, const std::vector<Batch>& batches,
                           const TensorMap& gradients, bool loss_is_finite);

}  // namespace everlong
