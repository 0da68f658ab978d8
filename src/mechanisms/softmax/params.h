// What one call of causal attention is: o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys
// that token t sees. README.md of this room, section 1.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/status.h"

namespace everlong::softmax {

// Legend used in the whole room: N sequences, B batch, T new tokens, S keys (past and new), P rows
// of a padded cache, H query heads, G key/value heads (H / G query heads in a row share one), K key
// dim, V value dim.
struct Params {
  std::int64_t batch = 1, tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0;       // of the scores, before softmax
  std::int64_t window = 0;  // a token sees itself and the window - 1 before it; 0: all before it
  std::vector<std::int64_t>
      cu_seqlens;  // N + 1 offsets, batch 1; empty: N = B sequences of T tokens
  std::vector<std::int64_t> state_lengths;  // N valid rows of the cache; empty: no past
  std::int64_t state_capacity = 0;          // P

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  std::int64_t first_token(std::int64_t n) const { return cu_seqlens.empty() ? 0 : cu_seqlens[n]; }
  std::int64_t length(std::int64_t n) const {
    return cu_seqlens.empty() ? tokens : cu_seqlens[n + 1] - cu_seqlens[n];
  }
  std::int64_t past(std::int64_t n) const { return state_lengths.empty() ? 0 : state_lengths[n]; }
  // Rows that the final state keeps for a sequence: all, or the window - 1 that a later token can
  // still see.
  std::int64_t kept(std::int64_t n) const;
};

using Shape = std::span<const std::int64_t>;

// Fills the sizes from the shapes of q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], and of a cache k
// [N,P,G,K], v [N,P,G,V] (empty: none). Refuses shapes that do not fit each other.
Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params);

// Refuses what no form of this room can run. Cheap; every entry calls it before any work.
Status validate(const Params& params);

// 1 / sqrt(key_dim), the scale where none is given.
double default_scale(std::int64_t key_dim);

// Pairs (token, key) that are computed for `tokens` tokens after `past` ones: what the cost counts.
double visible_pairs(std::int64_t past, std::int64_t tokens, std::int64_t window);

}  // namespace everlong::softmax
