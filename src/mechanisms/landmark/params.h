// What the calls of this room are: attention with landmarks over a text (section 2 of README.md),
// and retrieval of blocks from the past (section 3).
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"

namespace everlong::landmark {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Legend used in the whole room: N sequences, B batch, T new tokens, S keys (past and new), P rows
// of a padded cache, H query heads, G key/value heads (H / G query heads in a row share one), K key
// dim, V value dim. A section is a run of ordinary tokens with the landmark that closes it, so a
// landmark belongs to the section before it. Retrieval numbers blocks of L tokens, landmark
// included.
struct Params {
  std::int64_t batch = 1, tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0;  // of the scores, before softmax
  bool drop_empty =
      false;  // a section without ordinary tokens gets no weight; else its gate counts
              // in the denominator and multiplies nothing, as in the published code
  std::vector<std::int64_t>
      cu_seqlens;  // N + 1 offsets, batch 1; empty: N = B sequences of T tokens
  std::vector<std::int64_t> state_lengths;  // N valid rows of the cache; empty: no past
  std::int64_t state_capacity = 0;          // P

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  std::int64_t first_token(std::int64_t n) const { return cu_seqlens.empty() ? 0 : cu_seqlens[n]; }
  std::int64_t row(std::int64_t n) const { return cu_seqlens.empty() ? n : 0; }
  std::int64_t length(std::int64_t n) const {
    return cu_seqlens.empty() ? tokens : cu_seqlens[n + 1] - cu_seqlens[n];
  }
  std::int64_t past(std::int64_t n) const { return state_lengths.empty() ? 0 : state_lengths[n]; }
};

using Shape = std::span<const std::int64_t>;

// Fills the sizes from the shapes of q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], and of a cache k
// [N,P,G,K], v [N,P,G,V] (empty: none). Refuses shapes that do not fit each other.
Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params);

// Refuses what no form of this room can run. Cheap; every entry calls it before any work.
Status validate(const Params& params);

double default_scale(std::int64_t key_dim);  // 1 / sqrt(key_dim)

// 1 where (position + phase) mod block = block - 1, for positions [first, first + count): a
// landmark closes every block of that many tokens (itself included). phase: tokens of the first
// block that are missing.
std::vector<std::uint8_t> regular_landmarks(std::int64_t first, std::int64_t count,
                                            std::int64_t block, std::int64_t phase = 0);

// The sections of one sequence, in order. Every token is in one: content [begin, end) and, where it
// is closed, the landmark at `end`. The last may be open (and empty when the text ends with a
// landmark; then it is not listed).
struct Section {
  std::int64_t begin = 0, end = 0;
  bool closed = false;

  std::int64_t content() const { return end - begin; }
  std::int64_t next() const { return end + (closed ? 1 : 0); }
};
std::vector<Section> sections_of(std::span<const std::uint8_t> is_landmark);

// Which blocks a token reads from the past; section 3 of README.md.
enum class Granularity {
  kTokenHead,  // every token and head its own best blocks
  // The published offloading mode: one set of blocks a head for all tokens of a chunk, by their
  // largest probability. Later tokens of the chunk take part, so it is for chunks only.
  kHeadMaxOverTokens,
  kTokenMaxOverHeads,  // one set of blocks a token, by the largest probability over its heads
};
Result<Granularity> parse_granularity(const std::string& name);
const char* name_of(Granularity granularity);

// What tells how much a block matters to a query. Only the first has landmarks; the others are for
// texts without them, so that a model of plain softmax attention reads blocks too: attention is
// then the softmax over all tokens of what is read.
enum class BlockScore {
  kLandmark,  // the score of the block's landmark: one key a block
  kMean,      // of the mean of the block's keys, each turned to its place in the block
  kMax,       // the largest score of its tokens: every key of the past is scored
};
Result<BlockScore> parse_block_score(const std::string& name);  // "landmark", "mean", "max"

// How retrieval sees a text; positions count landmarks, which lie at every L - 1 modulo L.
struct Retrieval {
  std::int64_t block = 64;  // L, landmark included, at least 2
  std::int64_t top_k = 0;   // blocks read from the past; 0: all, -1: none (what is local alone)
  // Complete blocks before a token's own that it always sees at their true distance. Not in chunks.
  std::int64_t window = 0;
  // Tokens are seen as the published program sees a chunk: the blocks that were complete when it
  // began are the past, all else is local. The result then depends on how the text is cut.
  bool chunked = false;
  Granularity granularity = Granularity::kTokenHead;
  std::int64_t max_blocks = 0;  // of the past, the newest; 0: all
  BlockScore score = BlockScore::kLandmark;

  bool has_landmarks() const { return score == BlockScore::kLandmark; }

  // The first block that is local for a token at `position` of a call that began at `start`; those
  // before it are the past.
  std::int64_t first_local(std::int64_t position, std::int64_t start) const {
    return chunked ? start / block : std::max<std::int64_t>(position / block - window, 0);
  }
  // Oldest block of the past that is kept when blocks before `first` are past.
  std::int64_t oldest(std::int64_t first) const {
    return max_blocks > 0 ? std::max<std::int64_t>(first - max_blocks, 0) : 0;
  }
  // Blocks that are read of `count` kept ones.
  std::int64_t picks(std::int64_t count) const {
    if (top_k < 0) return 0;
    return top_k > 0 ? std::min(top_k, count) : count;
  }
};
Status validate(const Retrieval& retrieval);
// 1 where a token at [first, first + count) is a landmark: regular_landmarks, or nowhere.
std::vector<std::uint8_t> landmarks_of(const Retrieval& retrieval, std::int64_t first,
                                       std::int64_t count);

// Blocks are picked by score, the younger of two equals first. Equality is a matter of course: in a
// model's first layer all landmarks have one key. So that it does not hang on the last bit, scores
// are compared in multiples of this (fp64, and fp32 for all else).
inline constexpr double kScoreGrid64 = 0x1p-36, kScoreGrid32 = 0x1p-14;

// Tokens [begin, end) of a call that share the past: a chunk, or the part of one block.
struct Group {
  std::int64_t begin = 0, end = 0;  // positions
  std::int64_t first_local = 0;     // blocks before it are the past
};
std::vector<Group> groups_of(const Retrieval& retrieval, std::int64_t start, std::int64_t tokens);

// The frame in which positions are counted anew so that no angle grows (published code of
// lm_benchmark, rebased): with c = picks + 1 blocks of room, a token at absolute position i sits at
// i - shift(), block b of the past is scored at slot(b) and, as the t-th pick (t from 0, oldest
// first), read at place(b, t); slots and places are in blocks.
struct Frame {
  std::int64_t block = 1, first_local = 0, oldest = 0, picks = 0;

  Frame(const Retrieval& r, std::int64_t first)
      : block(r.block), first_local(first), oldest(r.oldest(first)), picks(r.picks(count())) {}
  std::int64_t count() const { return first_local - oldest; }
  std::int64_t shift() const { return (first_local - picks - 1) * block; }  // may be negative
  // The last `picks` blocks have true distances, all older ones share slot 0.
  std::int64_t slot(std::int64_t b) const {
    return std::max<std::int64_t>(b - (first_local - picks) + 1, 0);
  }
  std::int64_t place(std::int64_t b, std::int64_t t) const {
    return t + (b >= first_local - picks ? 1 : 0);
  }
};

}  // namespace everlong::landmark
