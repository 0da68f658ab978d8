// The chunk form of one block for a group of heads: where its tokens lie, its decays, its products.
// Used by op.cpp.
//
// Legend: A rows of the block, G heads of the group, R chunks of each row, n tokens of a chunk, K
// key dim, V value dim. Inside, tokens are laid out as [A, G, R, n, D] and kept as [A G R, n, D].
#pragma once
#include <ATen/core/Tensor.h>

#include "mechanisms/lightning/op_decay.h"
#include "mechanisms/lightning/op_plan.h"

namespace everlong::lightning {

// What one call needs to know besides its tensors.
struct Job {
  Decay decay;
  at::TensorOptions options;  // of everything inside: the state's dtype
  PlanLimits limits = {};
  Plan plan = {};
  std::int64_t heads = 0, head_group = 0;  // head_group: heads that are computed together
  at::Tensor slots = {}, order = {},
             head_index = {};  // packed: on the device; head_index [1, G, 1, 1]

  const DecayTables& tables() const { return decay.tables(options, limits.chunk, limits.group); }
  std::int64_t head_groups() const { return (heads + head_group - 1) / head_group; }
};

class Part {
 public:
  // Both must outlive the part.
  Part(const Job& job, const Block& block, std::int64_t first_head);

  std::int64_t rows() const { return block_.rows; }
  std::int64_t heads() const { return heads_; }
  std::int64_t ranks() const { return block_.ranks; }
  std::int64_t chunk() const { return block_.chunk; }

  // The part's tokens of x [B, T, H, D] in the working dtype; a view where the strides allow;
  // padding is zero.
  at::Tensor load(const at::Tensor& x_BTHD) const;
  // The reverse. `out` is [B, T, H, D]; packed, [1, T+1, H, D] whose last token takes the padding.
  void store(const at::Tensor& value, const at::Tensor& out) const;
  // The part's rows and heads [A, G, K, V] of states [rows, H, K, V], a view.
  at::Tensor states(const at::Tensor& all) const;

  // The decays of the part, cut out of the tables. A leading A is 1 where all rows share the
  // numbers.
  struct Decays {
    at::Tensor mask_G1nn, to_end_G1n1;
    at::Tensor from_start;  // [G, 1, n, 1]; packed first chunks [A, G, 1, n, 1], counted from each
                            // row's first token
    at::Tensor lost_AG11;   // expm1(-s tokens)
    at::Tensor between_BRR, chunks_GR1, chunk_G11;  // several chunks only: see DecayTables; B = A G
  };
  Decays decays() const;

 private:
  at::Tensor slots() const;
  at::Tensor head_index() const;

  const Job& job_;
  const Block& block_;
  std::int64_t first_head_, heads_;
};

struct Inputs {
  const at::Tensor &q, &k, &v;
};
struct Gradients {
  at::Tensor q, k, v;
};

// With a = from_start, w = to_end and S before each chunk (README section 2):
//   O = ((Q K^T) .* mask) V + diag(a) Q S,   S' = lambda^m S + (diag(w) K)^T V
// `states` [rows, H, K, V] moves on in place.
void forward_part(const Part& part, const Inputs& in, const at::Tensor& states,
                  const at::Tensor& out);

// With G = (dO V^T) .* mask and R = dL/dS after each chunk (README section 3):
//   dQ = G K + diag(a) dO S^T,  dK = G^T Q + diag(w) V R^T,  dV = ((Q K^T) .* mask)^T dO + diag(w)
//   K R R <- lambda^m R + (diag(a) Q)^T dO
// `before` is S before the block; `reverse` [rows, H, K, V] holds R and moves back in place.
void backward_part(const Part& part, const Inputs& in, const at::Tensor& grad_o,
                   const at::Tensor& before, const at::Tensor& reverse, const Gradients& out);

}  // namespace everlong::lightning
