// Scores of keys that stand for blocks and the best of them, exactly: every key is read, at SIMD
// speed, once for all queries. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

// Keys lie in tiles of 16 blocks, [K][16] each, so that a score needs no sum across lanes.
inline constexpr std::int64_t kTileBlocks = 16;

// Keys of neighbouring blocks: those of block `first + i` in lane i % 16 of tile i / 16. fp32 or
// bf16, any alignment; lanes behind the last block hold any numbers.
struct TiledKeys {
  const std::byte* tiles = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t key_dim = 0;
  std::int64_t first = 0;
};

// Queries for blocks [begin, end): old blocks share a place and so the queries turned to it, recent
// ones have their own (params.h, Frame).
struct Scan {
  const float* q_nK = nullptr;  // turned to where the blocks are scored
  std::int64_t begin = 0, end = 0;
};

// All blocks of a frame's past, old to young; queries q_SnK [picks + 1, n, K] by slot.
std::vector<Scan> scans_of(const Frame& frame, const float* q_SnK, std::int64_t slot_stride);

struct Pick {
  std::int64_t block = 0;
  float score = 0;  // scale q . k, not rounded to the grid
};

// scores_n16[i][j] = scale q_i . k_j for `count` queries and the blocks of `tiles` tiles. A score
// has the same bits whatever it is computed with. highest_n[i] >= every score of row i that is not
// NaN, or NaN; lanes behind the last block count.
void score_tiles(const float* q_nK, std::int64_t count, const TiledKeys& keys, std::int64_t tiles,
                 float scale, float* scores_n16, float* highest_n);

// Collects the `count` best of scores that come from young to old. Two scores that round to the
// same multiple of the grid are equal, and of equals the younger is kept. NaN is never picked
// before a number.
class BestBlocks {
 public:
  BestBlocks(std::int64_t count, double grid) : count_(count), per_grid_(1 / grid) {}
  // Scores of blocks [begin, begin + n), all older than what was offered before. `highest` as
  // score_tiles gives it.
  void offer(std::int64_t begin, std::span<const float> scores, float highest);
  std::vector<Pick> rising() const;  // by block

 private:
  struct Held {
    double level = 0;
    Pick pick;
  };
  static bool better(const Held& a, const Held& b) {
    return a.level != b.level ? a.level > b.level : a.pick.block > b.pick.block;
  }
  std::int64_t count_;
  double per_grid_;
  float least_ = 0;         // below it nothing can be picked, once full
  std::vector<Held> held_;  // a heap, the worst on top
};

// Offers best[i] the scores of query i for the scan's blocks, from young to old. The keys reach
// over the scan.
void offer_scores(const TiledKeys& keys, const Scan& scan, double scale,
                  std::span<BestBlocks> best);

}  // namespace everlong::landmark
