#include "layers/state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "layers/tiered_state.h"

namespace everlong {

std::unique_ptr<State> State::clone() const {
  std::vector<std::int64_t> all(positions_.size());
  std::iota(all.begin(), all.end(), std::int64_t{0});
  return select(all);
}

std::int64_t State::bytes() const {
  if (const auto* tiered = dynamic_cast<const TieredState*>(this)) return tiered->memory_bytes();
  std::int64_t total = static_cast<std::int64_t>(positions_.size() * sizeof(std::int64_t));
  for (const auto& [name, tensor] : tensors())
    total += static_cast<std::int64_t>(tensor.storage().nbytes());
  return total;
}

std::vector<std::int64_t> State::selected_positions(std::span<const std::int64_t> sequences) const {
  std::vector<std::int64_t> positions;
  for (const std::int64_t n : sequences)
    positions.push_back(n < 0 ? 0 : positions_.at(static_cast<std::size_t>(n)));
  return positions;
}

at::Tensor select_sequences(const at::Tensor& tensor, std::span<const std::int64_t> sequences) {
  const bool any_fresh = std::ranges::any_of(sequences, [](std::int64_t n) { return n < 0; });
  std::vector<std::int64_t> indices(sequences.begin(), sequences.end());
  for (auto& index : indices) index = std::max<std::int64_t>(index, 0);
  const at::Tensor index = at::tensor(indices, at::kLong).to(tensor.device());
  at::Tensor picked = tensor.index_select(0, index);
  if (!any_fresh) return picked;
  std::vector<std::int64_t> shape(static_cast<std::size_t>(tensor.dim()), 1);
  shape[0] = static_cast<std::int64_t>(sequences.size());
  std::vector<std::int64_t> fresh;
  for (const std::int64_t n : sequences) fresh.push_back(n < 0 ? 1 : 0);
  // Filled, not multiplied: a NaN of the sequence that lends its row must not reach a fresh one.
  return picked.masked_fill(
      at::tensor(fresh, at::kLong).to(at::kBool).view(shape).to(tensor.device()), 0);
}

}  // namespace everlong
