// Reading blocks of the past in float64, literally: every key is turned to the position that it is
// read at, for every token and head. README.md, section 3.
#pragma once
#include "mechanisms/landmark/reference.h"

namespace everlong::landmark::reference {

// One sequence from its start. q [tokens, heads, key_dim], k [tokens, kv_heads, key_dim], v
// [tokens, kv_heads, value_dim], none of them turned; landmarks where position mod block = block
// - 1, if retrieval.score has landmarks.
struct Stream {
  std::int64_t tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0, rope_base = 10000;
  bool interleaved = false;  // pairs (2i, 2i + 1), else (i, i + key_dim / 2)
  Retrieval retrieval;
  std::vector<std::int64_t> chunks;  // how many tokens come at a time
  std::span<const double> q, k, v;
};

struct Read {
  std::vector<double> out;             // [tokens, heads, value_dim]
  std::vector<std::int64_t> selected;  // [tokens, heads, top_k]: blocks, rising; -1: there is none
};
Read read_blocks(const Stream& stream);

}  // namespace everlong::landmark::reference
