#include "mechanisms/lightning/layer_state.h"

#include <ATen/ATen.h>

namespace everlong::lightning {
namespace {

std::string describe(const at::Tensor& t) {
  return t.defined() ? cat(t.scalar_type(), " ", t.sizes()) : std::string("no tensor");
}

}  // namespace

Status LightningState::restore(const TensorMap& tensors) {
  const auto found = tensors.find("S");
  if (found == tensors.end() || tensors.size() != 1)
    return invalid_argument("lightning: a state has one tensor, S; given ", tensors.size(),
                            " tensors", found == tensors.end() ? " without S" : "");
  const at::Tensor& S = found->second;
  if (!S.defined() || S.sizes() != S_.sizes() || S.scalar_type() != S_.scalar_type())
    return invalid_argument("lightning: S is ", describe(S), "; this state holds ", describe(S_));
  S_ = S.to(S_.device());
  return {};
}

std::unique_ptr<State> LightningState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<LightningState>(select_sequences(S_, sequences));
  out->positions() = selected_positions(sequences);
  return out;
}

std::int64_t LightningState::bytes_bound(std::int64_t /*tokens*/) const {
  return static_cast<std::int64_t>(S_.nbytes()) +
         sequences() * static_cast<std::int64_t>(sizeof(std::int64_t));
}

}  // namespace everlong::lightning
