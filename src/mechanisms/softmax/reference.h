// Causal attention in float64, written from the equations: the oracle of this room. Slow and plain
// on purpose.
//
//   s_ts = scale q_t . k_s,   p_ts = exp(s_ts) / sum_u exp(s_tu),   o_t = sum_s p_ts v_s,   s and u
//   over what t sees: token t sits at key index past + t and sees the keys (past + t - window, past
//   + t].
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace everlong::softmax::reference {

// One sequence. Arrays are row-major: q [tokens, heads, key_dim], k [past + tokens, kv_heads,
// key_dim], v [past + tokens, kv_heads, value_dim], out [tokens, heads, value_dim]. Query head h
// reads head h / (heads / kv_heads).
struct Problem {
  std::int64_t tokens = 0, past = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  std::int64_t window = 0;  // 0: none
  double scale = 1.0;
  std::span<const double> q, k, v;

  std::int64_t keys() const { return past + tokens; }
};

// The explicit softmax of each row.
std::vector<double> parallel(const Problem& problem);

// Token by token, with a cache that forgets what has left the window.
std::vector<double> recurrent(const Problem& problem);

// Partial softmax over blocks of keys, merged by their log-sum-exp (flash-style; 1805.02867,
// 2205.14135 section 3.1).
std::vector<double> online(const Problem& problem, std::int64_t block);

// Attention over some of the keys: `out` is normalised over those, `lse` the log of the sum of
// their exp(s).
struct Partial {
  std::vector<double> out;
  double lse;  // -inf: no key seen, out is 0
};
// The attention over both sets of keys: the weights are exp(lse) of each.
Partial merge(const Partial& a, const Partial& b);

struct Gradients {
  std::vector<double> q, k, v;
};
// Of L = sum <out, grad_out>: dv_s = sum_t p_ts do_t,  ds_ts = p_ts (do_t . v_s - do_t . o_t),
// dq_t = scale sum_s ds_ts k_s,  dk_s = scale sum_t ds_ts q_t. Keys of the past have gradients too.
Gradients gradients(const Problem& problem, std::span<const double> grad_out);

}  // namespace everlong::softmax::reference
