// What a layer of dilated attention carries: per pattern the lattice rows of the segment in
// progress, and nothing else.
#pragma once
#include "layers/mixer.h"
#include "mechanisms/longnet/op.h"

namespace everlong::longnet {

struct StateShape {
  Geometry geometry;
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
};

// Rows allocated for a pattern once `position` tokens have passed: powers of two from 16 on, at
// most the pattern's rows(). By the position alone, so every way of cutting a text leaves the same
// state.
std::int64_t capacity_for(const Pattern& pattern, std::int64_t position);

// tensors(): "k<i>" [N, G, C_i, K] and "v<i>" [N, G, C_i, V] for pattern i. Row l of a head is the
// position segment start + offset + l ratio; rows beyond rows_held are zeros and never read. Under
// grad mode new tensors are made (exact gradients through what is carried); without it rows are
// written in place.
class LatticeState final : public State {
 public:
  LatticeState(std::int64_t sequences, const StateShape& shape, const at::TensorOptions& options);

  TensorMap tensors() const override;
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

  // Takes the new tokens' q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] (keys rotated) behind the
  // past of their sequences, moves the positions on and returns the attention [B, T, H, V].
  at::Tensor attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                    const Sequences& sequences, const Options& options);

  // Rows held, [patterns][G], of one sequence.
  std::vector<std::vector<std::int64_t>> rows(std::int64_t sequence) const;

 private:
  std::vector<std::int64_t> capacities(std::int64_t position) const;
  void check_rows() const;
  void reserve(std::int64_t position);
  Past past_of(std::int64_t first, std::int64_t count) const;
  void write(std::int64_t first, std::int64_t count, const at::Tensor& k, const at::Tensor& v);

  StateShape shape_;
  std::vector<at::Tensor> k_, v_;
  bool owned_ =
      true;  // false: someone else may hold these tensors, or a graph: copy before writing
};

}  // namespace everlong::longnet
