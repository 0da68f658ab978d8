// Scores of landmark keys and the best of them, exactly: every key is read, at SIMD speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/dtype.h"

namespace everlong::landmark {

// Landmark keys lie in tiles of 16 blocks, [K][16] each, so that a score needs no sum across lanes.
inline constexpr std::int64_t kTileBlocks = 16;

// One query for blocks [begin, end): old blocks share a place and so a query, recent ones have
// their own (params.h, Frame).
struct Scan {
  const float* q_K = nullptr;  // turned to where the blocks are scored
  std::int64_t begin = 0, end = 0;
};

struct Pick {
  std::int64_t block = 0;
  float score = 0;  // scale q . k, not rounded to the grid
};

// scale q . k_j for the 16 blocks of each tile; keys [tiles][K][16], fp32 or bf16, any alignment.
void score_tiles(const float* q_K, const std::byte* keys, DType dtype, std::int64_t key_dim,
                 std::int64_t tiles, float scale, float* scores);

// Collects the `count` best of scores that come from young to old. Two scores that round to the
// same multiple of the grid are equal, and of equals the younger is kept. NaN is never picked
// before a number.
class BestBlocks {
 public:
  BestBlocks(std::int64_t count, double grid) : count_(count), per_grid_(1 / grid) {}
  // Scores of blocks [begin, begin + n), all older than what was offered before.
  void offer(std::int64_t begin, std::span<const float> scores);
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

}  // namespace everlong::landmark
