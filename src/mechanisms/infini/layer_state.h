// What an Infini-attention layer carries: the committed memory and the open segment.
#pragma once
#include "layers/mixer.h"
#include "layers/state_parts.h"
#include "mechanisms/infini/op.h"

namespace everlong::infini {

struct StateShape {
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
};

// tensors(), N sequences, C tokens of a segment: "M" [N, G, K, V] and "z" [N, G, K] in fp32 (fp64
// for fp64 weights), written at segment ends only; "k" [N, C, G, K] and "v" [N, C, G, V] of the
// open segment's tokens, keys not turned, in the dtype of the weights, and "weight" [N, C], how
// often each is written. Row r is the token r of the segment; rows behind position % C are zero.
// Under grad mode new tensors are made; without it rows are written in place until the segment
// ends.
class InfiniState final : public State {
 public:
  InfiniState(std::int64_t sequences, const StateShape& shape, const Options& options,
              const at::TensorOptions& weights);

  TensorMap tensors() const override;
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

  // Takes new tokens (as infini_attention does) behind the past of their sequences, moves the
  // positions on and returns the output [B, T, H, V].
  at::Tensor mix(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                 const at::Tensor& beta, const at::Tensor& weight_BT, const Sequences& sequences);

  // Adds the committed memory of `other`, as if its segments had been fed to this one first. The
  // linear rule only, whose memory is a sum; refused otherwise and when shapes differ.
  Status merge(const InfiniState& other);

  const at::Tensor& M() const { return M_; }
  const at::Tensor& z() const { return z_; }

 private:
  Carried carried(const StatePart& part) const;
  void own();

  StateShape shape_;
  Options options_;
  at::Tensor M_, z_, k_, v_, weight_;
  bool shared_ = false;  // someone else may hold these tensors: copy before writing
};

}  // namespace everlong::infini
