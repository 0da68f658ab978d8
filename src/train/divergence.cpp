#include "train/divergence.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <sstream>

#include "core/text.h"
#include "models/layer_trace.h"

namespace everlong {
namespace {

bool is_finite(const at::Tensor& tensor) {
  return !tensor.is_floating_point() || at::isfinite(tensor).all().item<bool>();
}

std::string layer_name(const Decoder& model, std::int64_t layer) {
  if (layer < 0) return "the embedding";
  const auto& types = model.config().layer_types;
  return cat("layer ", layer, " (", types.at(static_cast<std::size_t>(layer)), ")");
}

// The layer of a parameter or a state's tensor: the first number among the parts of its name.
// Nothing for embedding, last norm and head.
std::optional<std::int64_t> layer_of_name(const std::string& name) {
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '.');)
    if (const auto number = parse_count(part); number && std::to_string(*number) == part)
      return number;
  return std::nullopt;
}

// The first layer, in the order of the forward pass, that makes something not finite out of finite
// numbers.
std::optional<std::int64_t> first_bad_layer(Decoder& model, at::Device device,
                                            std::int64_t segment_tokens,
                                            const std::vector<Batch>& batches) {
  std::optional<std::int64_t> found;
  const LayerTrace trace([&](std::int64_t layer, const at::Tensor& x_BTD) {
    if (!found && !is_finite(x_BTD)) found = layer;
  });
  for (const auto& batch : batches) {
    Backprop again(model, device, Carry::kDetached, segment_tokens);
    (void)again.score(batch);
    if (found) break;
  }
  return found;
}

// The backward pass goes from the head to the embedding: the parameter that it reached first.
std::string first_bad_gradient(const TensorMap& gradients) {
  std::string first;
  std::int64_t order = -2;
  for (const auto& [name, gradient] : gradients) {
    if (is_finite(gradient)) continue;
    const bool embedding = name.find("embed") != name.npos || name.find("wte") != name.npos;
    const std::int64_t own = layer_of_name(name).value_or(embedding ? -1 : INT64_MAX);
    if (own <= order) continue;
    order = own;
    first = name;
  }
  return first;
}

}  // namespace

std::string where_it_began(Decoder& model, const Backprop& backprop, at::Device device,
                           std::int64_t segment_tokens, const std::vector<Batch>& batches,
                           const TensorMap& gradients, bool loss_is_finite) {
  const c10::NoGradGuard no_grad;
  for (const auto& entry : model.named_parameters()) {
    if (is_finite(entry.value())) continue;
    const auto layer = layer_of_name(entry.key());
    return cat("The weights ", entry.key(), layer ? " of " + layer_name(model, *layer) : "",
               " are not finite.");
  }
  if (const auto layer = first_bad_layer(model, device, segment_tokens, batches))
    return cat("It began in ", layer_name(model, *layer),
               ": what it puts out is not finite, what it takes in is.");
  if (backprop.carried())
    for (std::size_t i = 0; i < backprop.carried()->num_layers(); ++i)
      for (const auto& [name, tensor] : backprop.carried()->layer(i).tensors())
        if (!is_finite(tensor))
          return cat(
              "It began in ",
              layer_name(model,
                         std::min(static_cast<std::int64_t>(i), model.config().num_layers() - 1)),
              ": from a fresh state all is finite; \"", name, "\" of the carried state is not.");
  if (!loss_is_finite)
    return backprop.carried()
               ? "From fresh states all is finite: a state that was carried here is not."
               : "What every layer puts out is finite: it began in the head.";
  if (const std::string name = first_bad_gradient(gradients); !name.empty()) {
    const auto layer = layer_of_name(name);
    return cat("It began in the backward pass, at ", name,
               layer ? " of " + layer_name(model, *layer) : "",
               ": losses and what the layers put out are finite.");
  }
  return "Every layer's output and every gradient is finite by itself: their sums are too large.";
}

}  // namespace everlong
