// What one call of dilated attention is: patterns of aligned segments, each seen through a lattice.
// README.md of this room, section 1; LongNet (2307.02486) section 2.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"

namespace everlong::longnet {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Legend used in the whole room: N sequences, B batch, T new tokens, H query heads, G key/value
// heads (H / G query heads in a row share one), K key dim, V value dim, m rows of a buffer.

// Positions are cut into segments [t segment, (t+1) segment); within one, a head sees the
// positions whose distance from the segment's start is its offset modulo `ratio`.
struct Pattern {
  std::int64_t segment = 1, ratio = 1;

  // Most lattice rows of a segment: what a buffer of this pattern must hold.
  std::int64_t rows() const { return (segment + ratio - 1) / ratio; }
  friend bool operator==(const Pattern&, const Pattern&) = default;
};

enum class OffsetRule {
  kMod,    // h mod r: equation 13 of the paper. Lattices nest where r_i divides r_{i+1}.
  kBlock,  // floor(h / ceil(G / r)): the released code, torchscale
};

enum class Beyond {
  kFixed,  // every pattern at every position: exact LongNet, which forgets all at multiples of the
           // longest segment
  kGrow,   // pattern i >= 1 serves queries at positions >= segment of pattern i - 1: short texts
           // are exactly the first pattern alone
};

struct Geometry {
  std::vector<Pattern> patterns;
  OffsetRule offset_rule = OffsetRule::kMod;
  Beyond beyond = Beyond::kFixed;
  bool causal = true;
  // Bidirectional only: segments are filled up with keys of score 0 and value 0, as the released
  // code's zero padding does.
  bool phantom = false;
  // Gradient with the mixing weights held constant, as the released code's.
  bool detached = false;

  // Queries before this position do not use pattern i.
  std::int64_t active_from(std::size_t i) const {
    return beyond == Beyond::kGrow && i > 0 ? patterns[i - 1].segment : 0;
  }
};

struct Params {
  std::int64_t batch = 1, tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  double scale = 1.0;
  Geometry geometry;
  std::vector<std::int64_t>
      cu_seqlens;  // N + 1 offsets, batch 1; empty: N = B sequences of T tokens
  std::vector<std::int64_t> positions;  // tokens before this call, N of them; empty: none

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  std::int64_t first_token(std::int64_t n) const { return cu_seqlens.empty() ? 0 : cu_seqlens[n]; }
  std::int64_t length(std::int64_t n) const {
    return cu_seqlens.empty() ? tokens : cu_seqlens[n + 1] - cu_seqlens[n];
  }
  std::int64_t past(std::int64_t n) const { return positions.empty() ? 0 : positions[n]; }
};

inline constexpr std::int64_t kMostPatterns = 64;
inline constexpr std::int64_t kLongestSegment = std::int64_t{1} << 50;

// Builds patterns from two lists of equal length. Refuses empty lists, zeros, and too many.
Result<std::vector<Pattern>> make_patterns(std::span<const std::int64_t> segments,
                                           std::span<const std::int64_t> ratios);
Result<OffsetRule> offset_rule_of(const std::string& name);  // "mod", "block"
Result<Beyond> beyond_of(const std::string& name);           // "fixed", "grow"

using Shape = std::span<const std::int64_t>;
// Fills the sizes from the shapes of q [B,T,H,K], k [B,T,G,K], v [B,T,G,V].
Status read_shapes(Shape q, Shape k, Shape v, Params& params);

Status validate(const Geometry& geometry);
// Refuses what no form of this room can run. Cheap; every entry calls it before any work.
Status validate(const Params& params);

// 1 / sqrt(key_dim), the scale where none is given.
double default_scale(std::int64_t key_dim);

// The residue of a key/value head's lattice, in [0, ratio). GQA: heads that share a key share its
// lattice.
std::int64_t offset_of(OffsetRule rule, std::int64_t kv_head, std::int64_t kv_heads,
                       std::int64_t ratio);

// Lattice rows among the first `length` positions of a segment.
constexpr std::int64_t lattice_rows(std::int64_t length, std::int64_t offset, std::int64_t ratio) {
  return length > offset ? (length - 1 - offset) / ratio + 1 : 0;
}

// Rows that a buffer holds after `position` tokens: those of the segment of the last of them.
std::int64_t rows_held(const Pattern& pattern, std::int64_t offset, std::int64_t position);

}  // namespace everlong::longnet
