// What a layer of this room carries from token to token.
#pragma once
#include "layers/state.h"

namespace everlong::lightning {

// S [N, H, K, V] and the positions. Its size never changes.
class LightningState final : public State {
 public:
  explicit LightningState(at::Tensor S_NHKV) : State(S_NHKV.size(0)), S_(std::move(S_NHKV)) {}

  const at::Tensor& matrices() const { return S_; }
  void set_matrices(at::Tensor S_NHKV) { S_ = std::move(S_NHKV); }

  TensorMap tensors() const override { return {{"S", S_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 private:
  at::Tensor S_;  // fp32; fp64 under fp64 weights
};

}  // namespace everlong::lightning
