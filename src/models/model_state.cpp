#include "models/decoder.h"

#include <algorithm>
#include <numeric>

namespace everlong {
namespace {

std::string layer_prefix(std::size_t index) { return cat("layers.", index, "."); }

}  // namespace

std::int64_t ModelState::bytes() const {
  std::int64_t total = 0;
  for (const auto& layer : layers_) total += layer->bytes();
  return total;
}

std::int64_t ModelState::bytes_bound(std::int64_t tokens) const {
  std::int64_t total = 0;
  for (const auto& layer : layers_) total += layer->bytes_bound(tokens);
  return total;
}

ModelState ModelState::select(std::span<const std::int64_t> sequences) const {
  std::vector<std::unique_ptr<State>> layers;
  for (const auto& layer : layers_) layers.push_back(layer->select(sequences));
  return ModelState(std::move(layers));
}

ModelState ModelState::clone() const {
  std::vector<std::int64_t> all(static_cast<std::size_t>(sequences()));
  std::iota(all.begin(), all.end(), std::int64_t{0});
  return select(all);
}

TensorMap ModelState::tensors() const {
  TensorMap all;
  for (std::size_t i = 0; i < layers_.size(); ++i)
    for (const auto& [name, tensor] : layers_[i]->tensors()) all[layer_prefix(i) + name] = tensor;
  return all;
}

Status ModelState::restore(const TensorMap& tensors, const std::vector<std::int64_t>& positions) {
  if (static_cast<std::int64_t>(positions.size()) != sequences())
    return invalid_argument("positions of ", positions.size(),
                            " sequences were given; this state has ", sequences());
  for (const std::int64_t position : positions)
    if (position < 0) return invalid_argument("position ", position, " is negative");

  std::vector<TensorMap> by_layer(layers_.size());
  for (const auto& [name, tensor] : tensors) {
    std::size_t layer = 0;
    while (layer < layers_.size() && !name.starts_with(layer_prefix(layer))) ++layer;
    if (layer == layers_.size())
      return invalid_argument("tensor \"", name, "\" belongs to none of the ", layers_.size(),
                              " layers");
    by_layer[layer][name.substr(layer_prefix(layer).size())] = tensor;
  }
  // Fresh states take the tensors, and only when all have done so do they take the place of the old
  // ones.
  const std::vector<std::int64_t> fresh(positions.size(), -1);
  std::vector<std::unique_ptr<State>> layers;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    layers.push_back(layers_[i]->select(fresh));
    layers.back()->positions() = positions;
    EVERLONG_RETURN_IF_ERROR(layers.back()->restore(by_layer[i]).at(cat("layer ", i)));
  }
  layers_ = std::move(layers);
  return {};
}

void ModelState::detach() {
  for (const auto& layer : layers_) {
    TensorMap tensors = layer->tensors();
    for (auto& [name, tensor] : tensors) tensor = tensor.detach();
    throw_if_error(layer->restore(tensors));
  }
}

}  // namespace everlong
