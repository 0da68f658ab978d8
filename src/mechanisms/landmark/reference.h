// Landmark Attention in float64, written from the equations of 2305.16300 (sections 3.1 and 3.2)
// and README.md, section 2: the oracle of this room. Slow and plain on purpose.
//
// Token i sees its own section up to itself as ordinary attention does, and each closed section b
// before it through one gate: with s_ij = scale q_i . k_j and z_ib = s_i,landmark(b),
//   L_i = log( sum_{j own} e^s_ij + sum_b e^z_ib )      lambda_ib = log sum_{j in b} e^s_ij
//   w_ij = e^(s_ij - L_i) in its own section,  e^(z_ib - L_i) e^(s_ij - lambda_ib) in section b
//   o_i = sum_j w_ij v_j.  Landmarks have no weight of their own, nor has their value an effect.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "mechanisms/landmark/params.h"

namespace everlong::landmark::reference {

// The weights of one row: scores [S] of a query that sits in column `own`, is_landmark [S]. Columns
// after `own`, landmarks and a section's own landmark have weight 0. A row that sees nothing is 0.
std::vector<double> grouped_softmax(std::span<const double> scores,
                                    std::span<const std::uint8_t> is_landmark, std::int64_t own,
                                    bool drop_empty);

// Gradient of sum <weights, grad> by the scores of that row.
std::vector<double> grouped_softmax_gradient(std::span<const double> scores,
                                             std::span<const std::uint8_t> is_landmark,
                                             std::int64_t own, bool drop_empty,
                                             std::span<const double> grad);

// One sequence. Arrays are row-major: q [tokens, heads, key_dim], k [past + tokens, kv_heads,
// key_dim], v [past + tokens, kv_heads, value_dim], is_landmark [past + tokens], out [tokens,
// heads, value_dim]. Query head h reads head h / (heads / kv_heads).
struct Problem {
  std::int64_t tokens = 0, past = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0;
  bool drop_empty = false;
  std::span<const double> q, k, v;
  std::span<const std::uint8_t> is_landmark;

  std::int64_t keys() const { return past + tokens; }
};

// The explicit weights of each row.
std::vector<double> parallel(const Problem& problem);

// Section by section with a running maximum over gates: each past section is one virtual key of
// score z and value sum_j e^(s_j - lambda) v_j, merged as flash attention merges keys.
std::vector<double> two_level(const Problem& problem);

struct Gradients {
  std::vector<double> q, k, v;
};
// Of L = sum <out, grad_out>, with dP_ij = do_i . v_j, D_i = do_i . o_i and, for a past section,
// D_ib = sum_j e^(s_ij - lambda_ib) dP_ij:
//   own section  ds_ij = w_ij (dP_ij - D_i)        past section  ds_ij = w_ij (dP_ij - D_ib)
//   gate         dz_ib = g_ib (D_ib - D_i),        g_ib = e^(z_ib - L_i)
Gradients gradients(const Problem& problem, std::span<const double> grad_out);

}  // namespace everlong::landmark::reference
