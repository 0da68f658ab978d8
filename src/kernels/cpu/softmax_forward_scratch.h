// The scratch memory of SoftmaxForward, the same for every SIMD target.
#pragma once
#include <algorithm>

#include "kernels/cpu/softmax_block.h"

namespace everlong::cpu {

// Up to this many rows are worked on as rows, reading keys and values where they lie.
inline constexpr int kFewRows = 4;

// Legend: queries lie along the lanes, so that maximum and sum of a row need no shuffles.
struct ForwardScratch {
  float* q;      // transposed [key_dim][kSide], times scale log2(e); few rows: [kFewRows][kRow]
  float *k, *v;  // [kTileKeys][kRow]
  float* p;      // scores, then exp: [kTileKeys][kSide]; few rows: [kFewRows][kSide]
  float* o;      // [kTileRows][padded value_dim], not yet divided
  float *top, *sum, *fade;  // [kTileRows]: running maximum in units of log 2; sum; last factor

  static constexpr std::int64_t kCopy = kTileKeys * 272;
  static std::int64_t q_floats(std::int64_t key_dim) {
    return std::max<std::int64_t>(key_dim * kTileRows, kFewRows * 272);
  }
  static std::int64_t o_floats(std::int64_t value_dim) {
    return kTileRows * ((value_dim + 31) / 32 * 32);
  }
  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim) {
    return q_floats(key_dim) + 2 * kCopy + kTileKeys * kTileRows + o_floats(value_dim) +
           3 * kTileRows;
  }

  ForwardScratch() = default;
  ForwardScratch(void* base, std::int64_t key_dim, std::int64_t value_dim) {
    float* next = static_cast<float*>(base);
    const auto take = [&next](std::int64_t count) {
      float* mine = next;
      next += count;
      return mine;
    };
    q = take(q_floats(key_dim));
    k = take(kCopy);
    v = take(kCopy);
    p = take(kTileKeys * kTileRows);
    o = take(o_floats(value_dim));
    top = take(kTileRows);
    sum = take(kTileRows);
    fade = take(kTileRows);
  }
};

struct ForwardTile {
  ForwardScratch scratch;
  int rows = 0;
  Sight sight;
};

}  // namespace everlong::cpu
