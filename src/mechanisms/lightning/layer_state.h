// What a layer of this room carries from token to token.
#pragma once
#include <vector>

#include "layers/state.h"
#include "mechanisms/lightning/op_decay.h"

namespace everlong::lightning {

// Whether single tokens on a GPU wait in rings before they enter S (README.md, section 11).
enum class WriteBehind {
  kAuto,  // where that is faster
  kOn,    // wherever the kernel can
  kOff,
};

// S [N, H, K, V] and the positions. Its size never changes.
//
// Tokens that wait are this state's own affair: whoever asks for S gets it whole. S is written in
// place, but never while anybody else holds it: what tensors() gave stays as it was.
class LightningState final : public State {
 public:
  // token_dtype: of the keys and values that will come, usually that of the weights. Others are
  // served as well, without rings.
  LightningState(at::Tensor S_NHKV, Decay decay, WriteBehind write_behind,
                 at::ScalarType token_dtype);

  at::Tensor matrices() const;
  void set_matrices(at::Tensor S_NHKV);  // drops what waits

  // o [N, 1, H, V] of the next token of every sequence, which then waits in the rings; positions
  // are the caller's. Undefined, with nothing done, where the token has to enter S at once: on
  // other devices, for several tokens, where somebody wants gradients, where rings do not pay.
  at::Tensor step_behind(const at::Tensor& q_N1HK, const at::Tensor& k_N1HK,
                         const at::Tensor& v_N1HV);
  // Tokens of each sequence that are not in S yet.
  std::int64_t waiting() const { return waiting_; }

  TensorMap tensors() const override { return {{"S", matrices()}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes() const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 private:
  void open_rings();
  void fold() const;
  void drop_rings();

  at::Tensor S_;  // fp32; fp64 under fp64 weights. While tokens wait nobody else holds it
  Decay decay_;
  WriteBehind write_behind_;
  at::ScalarType token_dtype_;
  bool behind_;                     // what write_behind_ comes to for these sizes on this device
  at::Tensor keys_, values_;        // [N, H, R, K], [N, H, R, V]; undefined before the first token
  std::vector<at::Tensor> counts_;  // [r]: int32 [N], all r, where the kernel reads waiting_
  // Folding moves what waits into S: the same state, held in another way. So looking at a state,
  // which is const, may fold. The numbers of S change behind its handle; this is all else.
  mutable std::int64_t waiting_ = 0;
};

}  // namespace everlong::lightning
