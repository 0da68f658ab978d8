#include "mechanisms/megalodon/layer_state.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::megalodon {
namespace {

// `given` as the tensor `name` in the place of `mine`; a negative size of `wanted` is free.
Status check_tensor(const TensorMap& given, const char* name, const at::Tensor& mine,
                    std::vector<std::int64_t> wanted) {
  const auto found = given.find(name);
  if (found == given.end()) return invalid_argument("megalodon: the state lacks the tensor ", name);
  const at::Tensor& x = found->second;
  bool fits = x.defined() && x.scalar_type() == mine.scalar_type() &&
              x.dim() == static_cast<std::int64_t>(wanted.size());
  for (std::size_t i = 0; fits && i < wanted.size(); ++i)
    fits = wanted[i] < 0 || x.size(static_cast<std::int64_t>(i)) == wanted[i];
  if (fits) return {};
  std::vector<std::string> sizes;
  for (const auto size : wanted) sizes.push_back(size < 0 ? "rows" : cat(size));
  return invalid_argument("megalodon: state ", name, " is ",
                          x.defined() ? cat(x.scalar_type(), " ", x.sizes()) : "undefined", "; ",
                          mine.scalar_type(), " [", join(sizes, ", "), "] is needed");
}

// A cache of the size that holding `rows` has, whatever the way there was.
at::Tensor with_capacity(const at::Tensor& x, std::int64_t rows, std::int64_t chunk) {
  const std::int64_t missing = cache_capacity(rows, chunk) - x.size(1);
  return missing > 0 ? at::constant_pad_nd(x, {0, 0, 0, 0, 0, missing}) : x;
}

at::Tensor statistics(std::int64_t sequences, std::int64_t groups, at::Device device) {
  return at::zeros({sequences, groups}, at::TensorOptions().dtype(at::kDouble).device(device));
}

}  // namespace

NormState norm_state(const at::Tensor& mean_NG, const at::Tensor& var_NG,
                     const std::vector<std::int64_t>& positions) {
  return {positions, mean_NG, var_NG};
}

NormOnlyState::NormOnlyState(std::int64_t sequences, std::int64_t groups, at::Device device)
    : State(sequences),
      mean_(statistics(sequences, groups, device)),
      var_(statistics(sequences, groups, device)) {}

void NormOnlyState::set(NormState state) {
  positions() = std::move(state.counts);
  mean_ = std::move(state.mean_NG);
  var_ = std::move(state.var_NG);
}

Status NormOnlyState::restore(const TensorMap& tensors) {
  if (tensors.size() != 2)
    return invalid_argument("megalodon: a norm's state has the tensors mean and var; ",
                            tensors.size(), " were given");
  for (const char* name : {"mean", "var"})
    EVERLONG_RETURN_IF_ERROR(check_tensor(tensors, name, mean_, mean_.sizes().vec()));
  const at::Device device = mean_.device();
  mean_ = tensors.at("mean").to(device);
  var_ = tensors.at("var").to(device);
  return {};
}

std::unique_ptr<State> NormOnlyState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<NormOnlyState>(static_cast<std::int64_t>(sequences.size()),
                                             mean_.size(1), mean_.device());
  out->positions() = selected_positions(sequences);
  out->mean_ = select_sequences(mean_, sequences);
  out->var_ = select_sequences(var_, sequences);
  return out;
}

std::int64_t NormOnlyState::bytes_bound(std::int64_t /*tokens*/) const {
  return sequences() * (8 + 2 * 8 * mean_.size(1));
}

LayerState::LayerState(std::int64_t sequences, const LayerStateShape& shape,
                       const at::TensorOptions& options)
    : State(sequences),
      shape_(shape),
      mean_(statistics(sequences, shape.groups, options.device())),
      var_(statistics(sequences, shape.groups, options.device())),
      h_(at::zeros({sequences, shape.width, shape.modes, 2},
                   options.dtype() == at::kDouble ? options : options.dtype(at::kFloat))),
      k_(at::zeros({sequences, 0, shape.heads, shape.key_dim}, options)),
      v_(at::zeros({sequences, 0, shape.heads, shape.value_dim}, options)) {}

TensorMap LayerState::tensors() const {
  return {{"norm.mean", mean_},
          {"norm.var", var_},
          {"cema.h", h_},
          {"attn.cache_k", k_},
          {"attn.cache_v", v_}};
}

Status LayerState::restore(const TensorMap& given) {
  if (given.size() != tensors().size())
    return invalid_argument("megalodon: a state has ", tensors().size(), " tensors; ", given.size(),
                            " were given");
  const auto of_cache = [](const at::Tensor& mine, std::int64_t rows) {
    return std::vector<std::int64_t>{mine.size(0), rows, mine.size(2), mine.size(3)};
  };
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "norm.mean", mean_, mean_.sizes().vec()));
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "norm.var", var_, var_.sizes().vec()));
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "cema.h", h_, h_.sizes().vec()));
  EVERLONG_RETURN_IF_ERROR(check_tensor(given, "attn.cache_k", k_, of_cache(k_, -1)));
  EVERLONG_RETURN_IF_ERROR(
      check_tensor(given, "attn.cache_v", v_, of_cache(v_, given.at("attn.cache_k").size(1))));
  const at::Device device = h_.device();
  mean_ = given.at("norm.mean").to(device);
  var_ = given.at("norm.var").to(device);
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
  out->mean_ = select_sequences(mean_, sequences);
  out->var_ = select_sequences(var_, sequences);
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
  return sequences() * (8 + 2 * 8 * s.groups +
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

void LayerState::set(NormState norm, at::Tensor averages, ChunkCache cache) {
  positions() = std::move(norm.counts);
  mean_ = std::move(norm.mean_NG);
  var_ = std::move(norm.var_NG);
  h_ = std::move(averages);
  std::int64_t rows = 0;
  for (const std::int64_t count : cache.counts) rows = std::max(rows, count);
  k_ = with_capacity(cache.k_NPHK, rows, shape_.chunk);
  v_ = with_capacity(cache.v_NPHV, rows, shape_.chunk);
  shared_ = false;
}

}  // namespace everlong::megalodon
