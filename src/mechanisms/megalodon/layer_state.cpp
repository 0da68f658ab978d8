#include "mechanisms/megalodon/layer_state.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::megalodon {
namespace {

Status check_tensor_count(const TensorMap& given, std::int64_t wanted) {
  if (static_cast<std::int64_t>(given.size()) == wanted) return {};
  return invalid_argument("megalodon: the state has ", wanted, " tensors; ", given.size(),
                          " were given");
}

// A cache of the size that holding `rows` has, whatever the way there was.
at::Tensor with_capacity(const at::Tensor& x, std::int64_t rows, std::int64_t chunk) {
  const std::int64_t missing = cache_capacity(rows, chunk) - x.size(1);
  return missing > 0 ? at::constant_pad_nd(x, {0, 0, 0, 0, 0, missing}) : x;
}

}  // namespace

std::vector<std::int64_t> moved_positions(std::vector<std::int64_t> positions,
                                          const Sequences& sequences, std::int64_t tokens) {
  for (std::size_t n = 0; n < positions.size(); ++n)
    positions[n] += sequences.length(static_cast<std::int64_t>(n), tokens);
  return positions;
}

NormOnlyState::NormOnlyState(std::int64_t sequences, std::int64_t groups, const NormWindow& window,
                             at::Device device)
    : State(sequences), memory_(sequences, groups, window, device) {}

void NormOnlyState::set(NormMemory memory, std::vector<std::int64_t> moved) {
  memory_ = std::move(memory);
  positions() = std::move(moved);
}

TensorMap NormOnlyState::tensors() const {
  TensorMap out;
  memory_.add_to(out, "");
  return out;
}

Status NormOnlyState::restore(const TensorMap& given) {
  EVERLONG_RETURN_IF_ERROR(check_tensor_count(given, memory_.tensor_count()));
  return memory_.restore(given, "");
}

std::unique_ptr<State> NormOnlyState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<NormOnlyState>(*this);
  out->memory_ = memory_.select(sequences);
  out->positions() = selected_positions(sequences);
  return out;
}

std::int64_t NormOnlyState::bytes_bound(std::int64_t /*tokens*/) const {
  return sequences() * (8 + memory_.bytes_per_sequence());
}

LayerState::LayerState(std::int64_t sequences, const LayerStateShape& shape,
                       const at::TensorOptions& options)
    : State(sequences),
      shape_(shape),
      norm_(sequences, shape.groups, shape.norm_window, options.device()),
      h_(at::zeros({sequences, shape.width, shape.modes, 2},
                   options.dtype() == at::kDouble ? options : options.dtype(at::kFloat))),
      k_(at::zeros({sequences, 0, shape.heads, shape.key_dim}, options)),
      v_(at::zeros({sequences, 0, shape.heads, shape.value_dim}, options)) {}

TensorMap LayerState::tensors() const {
  TensorMap out = {{"cema.h", h_}, {"attn.cache_k", k_}, {"attn.cache_v", v_}};
  norm_.add_to(out, "norm.");
  return out;
}

Status LayerState::restore(const TensorMap& given) {
  EVERLONG_RETURN_IF_ERROR(check_tensor_count(given, norm_.tensor_count() + 3));
  const auto of_cache = [](const at::Tensor& mine, std::int64_t rows) {
    return std::vector<std::int64_t>{mine.size(0), rows, mine.size(2), mine.size(3)};
  };
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "cema.h", h_, h_.sizes().vec()));
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "attn.cache_k", k_, of_cache(k_, -1)));
  EVERLONG_RETURN_IF_ERROR(
      check_tensor(given, "attn.cache_v", v_, of_cache(v_, given.at("attn.cache_k").size(1))));
  EVERLONG_RETURN_IF_ERROR(norm_.restore(given, "norm."));
  const at::Device device = h_.device();
  h_ = given.at("cema.h").to(device);
  k_ = given.at("attn.cache_k").to(device);
  v_ = given.at("attn.cache_v").to(device);
  shared_ = true;
  return {};
}

std::unique_ptr<State> LayerState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<LayerState>(static_cast<std::int64_t>(sequences.size()), shape_,
                                          k_.options().requires_grad(false));
  out->positions() = selected_positions(sequences);
  out->norm_ = norm_.select(sequences);
  out->h_ = select_sequences(h_, sequences);
  std::int64_t rows = 0;
  for (const std::int64_t position : out->positions())
    rows = std::max(rows, position % shape_.chunk);
  // Rows that a copy may append to are its own; those that nobody holds are left behind.
  const auto held = [&](const at::Tensor& x) {
    return with_capacity(select_sequences(x.narrow(1, 0, std::min(rows, x.size(1))), sequences),
                         rows, shape_.chunk);
  };
  out->k_ = held(k_);
  out->v_ = held(v_);
  return out;
}

std::int64_t LayerState::bytes_bound(std::int64_t tokens) const {
  const LayerStateShape& s = shape_;
  const std::int64_t rows = cache_capacity(std::clamp<std::int64_t>(tokens, 0, s.chunk), s.chunk);
  return sequences() * (8 + norm_.bytes_per_sequence() +
                        s.width * s.modes * 2 * static_cast<std::int64_t>(h_.element_size()) +
                        rows * s.heads * (s.key_dim + s.value_dim) *
                            static_cast<std::int64_t>(k_.element_size()));
}

ChunkCache LayerState::cache() const {
  ChunkCache out{positions(), k_, v_};
  for (auto& count : out.counts) {
    TORCH_CHECK_VALUE(count >= 0 && count % shape_.chunk <= k_.size(1),
                      "megalodon: a state at position ", count, " needs ", count % shape_.chunk,
                      " rows of keys; its tensors have ", k_.size(1),
                      ". Restore the tensors that belong to the position.");
    count %= shape_.chunk;
  }
  return out;
}

void LayerState::set(NormMemory norm, std::vector<std::int64_t> moved, at::Tensor averages,
                     ChunkCache cache) {
  positions() = std::move(moved);
  norm_ = std::move(norm);
  h_ = std::move(averages);
  std::int64_t rows = 0;
  for (const std::int64_t count : cache.counts) rows = std::max(rows, count);
  k_ = with_capacity(cache.k_NPHK, rows, shape_.chunk);
  v_ = with_capacity(cache.v_NPHV, rows, shape_.chunk);
  shared_ = false;
}

}  // namespace everlong::megalodon
