// How the chunks of a call are shared out among the blocks of Hopper's engine. Only in builds with
// CUDA.
#pragma once
#include <array>

#include "mechanisms/lightning/kernel_sm90_parts.cuh"

namespace everlong::lightning::engine {

// One pass over all sequences, in or against time.
struct Pass {
  std::array<std::int64_t, 4> sizes_BTHK;
  std::int64_t V;
  StateRows in, out;
  std::span<const double> slope_H;
  double scale;
  bool exact;
  void* workspace;
  CudaPacking packing;
  bool fused = false;  // silu on the way: a chunk costs a block more than its share of the memory
};

struct Plan {
  int ranges = 0, parts = 1;  // as in Launch
  std::array<int, kMaxRanges + 1> cut;
};

constexpr int chunks_of(std::int64_t tokens) {
  return static_cast<int>((tokens + kChunk - 1) / kChunk);
}

Plan make_plan(const Pass& pass, int processors);

}  // namespace everlong::lightning::engine
