// Shapes of one attention call and of its padded cache: the checks that the rooms with q, k and v
// share. Messages begin with the room's name. Legend: N sequences, B batch, T new tokens, P rows of
// a cache, H query heads, G key/value heads, K key dim, V value dim.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "core/status.h"

namespace everlong {

std::string brackets(std::span<const std::int64_t> shape);  // "[2, 64, 4]"

struct AttentionSizes {
  std::int64_t batch = 1, tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;

  // The sizes of a room's Params, and into them.
  template <class Params>
  static AttentionSizes of(const Params& p) {
    return {p.batch, p.tokens, p.heads, p.kv_heads, p.key_dim, p.value_dim};
  }
  template <class Params>
  void put_into(Params& p) const {
    p.batch = batch;
    p.tokens = tokens;
    p.heads = heads;
    p.kv_heads = kv_heads;
    p.key_dim = key_dim;
    p.value_dim = value_dim;
  }
};

// Sizes of q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]; refuses shapes that do not fit each other.
Result<AttentionSizes> attention_sizes(std::string_view room, std::span<const std::int64_t> q,
                                       std::span<const std::int64_t> k,
                                       std::span<const std::int64_t> v);

// A row at least, dims >= 1, and query heads that share the key/value heads evenly.
Status check_sizes(std::string_view room, const AttentionSizes& sizes);

// The rows P of caches k [N,P,G,K] and v [N,P,G,V] of `sequences` sequences; both empty: 0.
Result<std::int64_t> cache_rows(std::string_view room, std::span<const std::int64_t> k,
                                std::span<const std::int64_t> v, std::int64_t sequences,
                                const AttentionSizes& sizes);

// The valid rows of a cache of `capacity`, one number a sequence; none at all is legal: no past.
Status check_cache_lengths(std::string_view room, std::span<const std::int64_t> lengths,
                           std::int64_t sequences, std::int64_t capacity);

}  // namespace everlong
