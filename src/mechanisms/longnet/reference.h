// Dilated attention in float64, written from the equations: the oracle of this room. Slow and plain
// on purpose; it shares no lattice code with the other forms but offset_of.
//
//   c_h(p, j) = patterns in which p and j lie in one segment and both on head h's lattice (j <= p
//   if causal) O_h(p) = sum_j softmax_j(scale q_p . k_j + log c_h(p, j)) v_j        README.md,
//   equation (0)
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "mechanisms/longnet/params.h"

namespace everlong::longnet::reference {

// Per pattern the rows of the segment in progress, [G, rows(), K] and [G, rows(), V]: row l of head
// g is the position segment start + offset + l ratio.
struct Buffers {
  std::vector<std::vector<double>> k, v;
};

// One sequence. Arrays are row-major: q [tokens, heads, key_dim], k [tokens, kv_heads, key_dim],
// v [tokens, kv_heads, value_dim], out [tokens, heads, value_dim].
struct Problem {
  std::int64_t tokens = 0, position = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0;
  Geometry geometry;
  std::span<const double> q, k, v;
  Buffers past;  // empty when position is 0
};

// Equation (0): one softmax over all keys, a key's score raised by the logarithm of how often it is
// seen.
std::vector<double> closed_form(const Problem& problem);

// Each pattern alone, merged by the log-sum-exps; `lse` and `mix` tell the parts.
struct Merged {
  std::vector<double> out;
  std::vector<double> lse;  // [tokens, heads]; -inf where no pattern covers the row
  // [tokens, heads, patterns]: exp(lse_i - lse), 0 where pattern i does not cover the row.
  std::vector<double> mix;
};
Merged merged(const Problem& problem);
// The same with mixing weights given, [tokens, heads, patterns]: what the detached gradient
// differentiates.
std::vector<double> mixed_by(const Problem& problem, std::span<const double> mix);

// Token by token, holding nothing but the buffers. Causal only.
std::vector<double> recurrent(const Problem& problem);

// What the sequence carries on: after position + tokens tokens. Rows beyond those held are 0.
Buffers final_buffers(const Problem& problem);

struct Gradients {
  std::vector<double> q, k, v;
  Buffers past;
};
// Of L = sum <out, grad_out> (README.md, section 3), joint or detached as the geometry says.
Gradients gradients(const Problem& problem, std::span<const double> grad_out);

}  // namespace everlong::longnet::reference
