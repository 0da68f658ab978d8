// What one call of Infini-attention is: softmax attention inside segments, a linear memory of all
// segments before. README.md of this room, section 1; arXiv 2404.07143 eq. 4-10.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/settings.h"
#include "core/status.h"

namespace everlong::infini {

enum class Update {
  kLinear,  // M += sigma(k)^T v
  kDelta,   // M += sigma(k)^T (v - what the memory already answers for k)
};
enum class DeltaZ {
  kPaper,  // z += sigma(k)
  kArmt,   // z += gamma sigma(k), gamma = clip(1 - sigma(k).z / |sigma(k)|^2, 0, 1): 2407.04841
};
enum class Empty {
  kBypass,  // nothing written yet: the output is the local attention
  kZero,    // ... (1 - g) times the local attention
};
enum class Rope { kNone, kHalfSplit, kInterleaved };
enum class Gate { kSigmoid, kHardSigmoid };

// How a layer reads, mixes and writes; the same for every sequence.
struct Options {
  std::int64_t segment = 2048;  // tokens
  Update update = Update::kLinear;
  DeltaZ delta_z = DeltaZ::kPaper;
  Empty empty = Empty::kBypass;
  Gate gate = Gate::kSigmoid;
  Rope rope = Rope::kHalfSplit;  // of the local attention, by the position in the segment
  double rope_theta = 10000;
  double scale = 0;  // of the local scores; 0: 1 / sqrt(key dim)
  // Gradients leave a segment's memory for at most so many segments before it: the memory that
  // enters segment s is cut from its past where s is a multiple. 0: through all; 1: the write path
  // gets no gradient at all.
  std::int64_t bptt_segments = 0;
  bool read = true;          // false: memory is written but never read, as if it stayed empty
  bool commit_last = false;  // an open last segment is closed and written
};

// The settings that are named alike for operators and layers: update, delta_z, empty, rope_theta,
// bptt_segments.
void read_common(Settings& settings, Options& options);
// segment >= 1, armt only with delta, finite numbers > 0; `key_dim` even where keys turn.
Status validate(const Options& options, std::int64_t key_dim);

// Legend used in the whole room: N sequences, B batch, T new tokens, H query heads, G key/value
// heads (H / G query heads in a row share one, and its memory), K key dim, V value dim, S segments,
// C tokens of a segment.
struct Params {
  std::int64_t batch = 1, tokens = 0, heads = 1, kv_heads = 1, key_dim = 1, value_dim = 1;
  std::vector<std::int64_t> cu_seqlens;  // N + 1 offsets, batch 1; empty: N = B rows of T tokens
  std::vector<std::int64_t> positions;   // N tokens fed before; empty: none
  Options options;

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  std::int64_t length(std::int64_t n) const {
    return cu_seqlens.empty() ? tokens : cu_seqlens[n + 1] - cu_seqlens[n];
  }
  std::int64_t position(std::int64_t n) const { return positions.empty() ? 0 : positions[n]; }
  std::int64_t position_after(std::int64_t n) const;
  // Tokens of the open segment.
  std::int64_t open(std::int64_t n) const { return position(n) % options.segment; }
  std::int64_t open_after(std::int64_t n) const { return position_after(n) % options.segment; }
};

using Shape = std::span<const std::int64_t>;

// Fills the sizes from the shapes of q [B,T,H,K], k [B,T,G,K], v [B,T,G,V]; refuses what does not
// fit.
Status read_shapes(Shape q, Shape k, Shape v, Params& params);
Status validate(const Params& params);

double scale_of(const Options& options, std::int64_t key_dim);

// Bytes of the memory (M and z, fp32) of one layer and sequence: 4 G K (V + 1).
double memory_bytes(std::int64_t kv_heads, std::int64_t key_dim, std::int64_t value_dim);

// Elements (not bytes) that a model carries for one sequence, as table 2 of the paper counts them,
// and the open segment, which it leaves out: keys and values of up to a segment in every layer,
// which any decoder must hold. The paper's ratio of 114 is memorizing / infini; what decoding holds
// is infini + local.
struct MemoryTable {
  double infini = 0, local = 0;
  double transformer_xl = 0;  // the keys and values of one segment before
  double memorizing = 0;      // that, and 65,000 of both in one layer (Memorizing Transformers)
};
MemoryTable memory_table(std::int64_t layers, std::int64_t kv_heads, std::int64_t dim,
                         std::int64_t segment);

}  // namespace everlong::infini
