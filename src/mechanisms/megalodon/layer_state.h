// What a Megalodon layer carries: the statistics of its timestep norm, the state of its moving
// average, and the keys and values of the unfinished chunk. The phase of a sequence in its chunk is
// its position modulo the chunk size, so sequences of a batch may be anywhere.
#pragma once
#include "layers/state.h"
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {

NormState norm_state(const at::Tensor& mean_NG, const at::Tensor& var_NG,
                     const std::vector<std::int64_t>& positions);

// Of a timestep norm by itself: "mean" and "var" [N, G] fp64; its count is the position.
class NormOnlyState final : public State {
 public:
  NormOnlyState(std::int64_t sequences, std::int64_t groups, at::Device device);

  const at::Tensor& mean() const { return mean_; }
  const at::Tensor& var() const { return var_; }
  void set(NormState state);  // positions too

  TensorMap tensors() const override { return {{"mean", mean_}, {"var", var_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 private:
  at::Tensor mean_, var_;
};

struct LayerStateShape {
  std::int64_t width = 1, groups = 1, modes = 1, heads = 1, key_dim = 2, value_dim = 1, chunk = 1;
};

// "norm.mean", "norm.var" [N, G] fp64; "cema.h" [N, D, M, 2] fp32 (fp64 under fp64 weights);
// "attn.cache_k" [N, P, H, K] and "attn.cache_v" [N, P, H, V] in the dtype of the weights, of which
// a sequence holds the first position % chunk rows; what lies behind is never read. Without grad
// mode rows are appended in place, never over rows that are held.
class LayerState final : public State {
 public:
  LayerState(std::int64_t sequences, const LayerStateShape& shape,
             const at::TensorOptions& options);

  TensorMap tensors() const override;
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

  NormState norm() const { return norm_state(mean_, var_, positions()); }
  const at::Tensor& averages() const { return h_; }
  // Throws when the caches hold fewer rows than the positions say.
  ChunkCache cache() const;
  // The buffers may be somebody else's too: to be copied before rows are appended.
  bool shared() const { return shared_; }

  // What a call left behind; the positions move to the norm's counts.
  void set(NormState norm, at::Tensor averages, ChunkCache cache);

 private:
  LayerStateShape shape_;
  at::Tensor mean_, var_, h_, k_, v_;
  bool shared_ = false;
};

}  // namespace everlong::megalodon
