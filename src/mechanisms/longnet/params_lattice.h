// Which rows of a call belong to one pattern and one offset: runs of segments that look alike, so
// that a strided view covers them.
#pragma once
#include <cstdint>
#include <vector>

#include "mechanisms/longnet/params.h"

namespace everlong::longnet {

// `segments` segments in a row. In each, `past` rows of the buffer come first (the first segment of
// a call only), then `keys` rows of the call, `ratio` tokens apart; the last `queries` of these are
// queries. Segment n's first key is token key_token + n * segment of the call.
struct LatticeRun {
  std::int64_t segments = 0, key_token = 0, keys = 0, queries = 0, past = 0;
  std::int64_t phantom = 0;  // zero keys that every query of it sees as well

  std::int64_t all_keys() const { return past + keys; }
};

// For the tokens [position, position + tokens) of one sequence. Bidirectional: position is 0.
std::vector<LatticeRun> make_runs(const Geometry& geometry, std::size_t pattern,
                                  std::int64_t offset, std::int64_t position, std::int64_t tokens);

// Key/value heads first, first + step, .. (count of them) whose lattice has this offset.
struct HeadClass {
  std::int64_t offset = 0, first = 0, step = 1, count = 0;
};
// Every head once, ordered by offset.
std::vector<HeadClass> head_classes(OffsetRule rule, std::int64_t kv_heads, std::int64_t ratio);

// Pairs (query, key) that the patterns make for `tokens` tokens behind `past` ones, summed over the
// key/value heads: what the cost counts. A key seen twice counts twice.
double visible_pairs(const Geometry& geometry, std::int64_t kv_heads, std::int64_t past,
                     std::int64_t tokens);

}  // namespace everlong::longnet
