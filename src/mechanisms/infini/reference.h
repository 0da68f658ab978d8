// Infini-attention in float64, written from the equations: the oracle of this room. Slow and plain
// on purpose. sigma(x) = max(x, 0) + exp(min(x, 0)); segment s of C tokens, M and z as they were
// before it:
//
//   dot_t = softmax over the own segment up to t of (scale R q_t . R k_j) v_j
//   mem_t = sigma(q_t) M / (sigma(q_t) . z)              o_t = g mem_t + (1 - g) dot_t
//   M += sum_t w_t sigma(k_t)^T (v_t - R_t),  z += sum_t w_t gamma_t sigma(k_t)   at the end of s
//   R_t = 0 (linear) or sigma(k_t) M / (sigma(k_t) . z) (delta);  gamma = 1, or as DeltaZ::kArmt
#pragma once
#include <span>
#include <vector>

#include "mechanisms/infini/params.h"

namespace everlong::infini::reference {

// One sequence. Row-major: q [tokens, heads, K]; k, v, weight [open + tokens, kv_heads, K], [..,
// V], [..]: the tokens of the open segment come first. gate [heads, V] holds g itself, in [0, 1].
// M [kv_heads, K, V], z [kv_heads, K]: the committed memory, zero when nothing was written.
struct Problem {
  std::int64_t tokens = 0, open = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  std::int64_t first_segment = 0;  // number of the segment that is open; only bptt asks
  Options options;
  std::vector<double> q, k, v, weight, gate, M, z;
  // Replaces sigma in tests (identity features); null: ELU + 1.
  double (*feature)(double) = nullptr;

  std::int64_t rows() const { return open + tokens; }
  std::int64_t group() const { return heads / kv_heads; }
  // Segments that end within these rows, the last perhaps short.
  std::int64_t closed() const;
};

struct Answer {
  std::vector<double> out;  // [tokens, heads, V]
  std::vector<double> M, z;
};

double sigma(double x);

// Token by token: what has been written is added where its segment ends.
Answer stream(const Problem& problem);
// The write of every segment, then a scan: M_s = (I - A_s) M_{s-1} + B_s, A_s = sum w sigma(k)^T
// sigma(k) / den, B_s = sum w sigma(k)^T v; the linear rule has A = 0.
Answer scan(const Problem& problem);
// K slots of mean value M_i / z_i, read with softmax_i(log sigma(q_i) + log z_i) and moved to their
// new means segment by segment. Not for identity features, whose logarithm does not exist.
Answer slots(const Problem& problem);
// Every pair of tokens: mem_t = sum_j w_j (sigma(q_t).sigma(k_j)) e_j / sum_j .., over j of closed
// segments, where e_j = v_j less what the pairs before its segment answer (delta).
Answer explicit_pairs(const Problem& problem);

struct Gradients {
  std::vector<double> q, k, v, gate, M, z;
};
// Of <out, grad_out> + <M, grad_M> + <z, grad_z> (empty: zero), by hand: README.md, section 3.
// gamma and the weights count as constants.
Gradients gradients(const Problem& problem, std::span<const double> grad_out,
                    std::span<const double> grad_M, std::span<const double> grad_z);

}  // namespace everlong::infini::reference
