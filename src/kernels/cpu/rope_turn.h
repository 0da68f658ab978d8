// Rotary position embedding of fp32 vectors on the CPU (angles: kernels/rope.h). Torch-free.
#pragma once
#include "kernels/rope.h"

namespace everlong::cpu {

// The heads of one token: x [heads, head_dim], rows head_stride apart -> out, contiguous. cos, sin
// [count]: pair i turns by their angle, (a, b) -> (a cos - sign b sin, b cos + sign a sin);
// coordinates from 2 count on are copied. x and out must not overlap. Thread safe.
struct RopeTurn {
  std::int64_t heads = 0, head_dim = 0, head_stride = 0, count = 0;
  RopePairs pairs = RopePairs::kHalfSplit;
  float sign = 1;
};
void turn_token(const RopeTurn& turn, const float* x, const float* cos, const float* sin,
                float* out);

}  // namespace everlong::cpu
