// What a Megalodon layer carries: the statistics of its timestep norm, the state of its moving
// average, and the keys and values of the unfinished chunk. The phase of a sequence in its chunk is
// its position modulo the chunk size, so sequences of a batch may be anywhere.
#pragma once
#include "layers/mixer.h"
#include "layers/state.h"
#include "mechanisms/megalodon/layer_norm_memory.h"

namespace everlong::megalodon {

// Where sequences are after `tokens` more of a call (of a packed line: each its own part of it).
std::vector<std::int64_t> moved_positions(std::vector<std::int64_t> positions,
                                          const Sequences& sequences, std::int64_t tokens);

// Of a timestep norm by itself: the tensors of NormMemory; its count is the position.
class NormOnlyState final : public State {
 public:
  NormOnlyState(std::int64_t sequences, std::int64_t groups, const NormWindow& window,
                at::Device device);

  const NormMemory& memory() const { return memory_; }
  void set(NormMemory memory, std::vector<std::int64_t> positions);

  TensorMap tensors() const override;
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 private:
  NormMemory memory_;
};

struct LayerStateShape {
  std::int64_t width = 1, groups = 1, modes = 1, heads = 1, key_dim = 2, value_dim = 1, chunk = 1;
  NormWindow norm_window = {};
};

// "norm." and the tensors of NormMemory; "cema.h" [N, D, M, 2] fp32 (fp64 under fp64 weights);
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

  const NormMemory& norm() const { return norm_; }
  const at::Tensor& averages() const { return h_; }
  // Throws when the caches hold fewer rows than the positions say.
  ChunkCache cache() const;
  // The buffers may be somebody else's too: to be copied before rows are appended.
  bool shared() const { return shared_; }

  // What a call left behind.
  void set(NormMemory norm, std::vector<std::int64_t> positions, at::Tensor averages,
           ChunkCache cache);

 private:
  LayerStateShape shape_;
  NormMemory norm_;
  at::Tensor h_, k_, v_;
  bool shared_ = false;
};

}  // namespace everlong::megalodon
