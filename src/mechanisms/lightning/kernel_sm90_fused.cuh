// Work that rides along with the forward pass while memory binds: q, k, v become
// silu(x) = x / (1 + exp(-x)) in shared memory, between the copy that brings a stage and the
// products that use it, by a warpgroup of its own; and the sums of o^2 that a norm over all heads
// needs.
#pragma once
#include "mechanisms/lightning/kernel_sm90_parts.cuh"

namespace everlong::lightning::engine {

// silu of two neighbours in bf16, as h + h tanh(h) with h = x / 2: one special function a number,
// where an exponential and a reciprocal would bind. tanh.approx is good to 2^-11 of itself, silu so
// to 2^-12 |x|, below the rounding of its neighbours of size |x|.
__device__ __forceinline__ std::uint32_t silu(std::uint32_t pair) {
  const auto turned = [](float x) {
    const float half = 0.5f * x;
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
    return fmaf(half, t, half);
  };
  return pack(turned(__uint_as_float(pair << 16)), turned(__uint_as_float(pair & 0xffff0000u)));
}
__device__ __forceinline__ uint4 silu(const uint4& x) {
  return {silu(x.x), silu(x.y), silu(x.z), silu(x.w)};
}

// silu of the bytes [begin, end) of a stage. By one warpgroup; each thread takes the same bytes as
// in clear_behind(). One warp a scheduler waits for all that it computes, so four pieces go
// together; more warps, and more or fewer pieces, are not faster (docs/benchmarks.md).
__device__ __forceinline__ void silu_of_bytes(unsigned char* stage, int begin, int end) {
  constexpr int kAtOnce = 4, kStep = 16 * kWarpgroup;
  const auto at = [&](int byte) { return reinterpret_cast<uint4*>(stage + byte); };
  int byte = begin + static_cast<int>(threadIdx.x) % kWarpgroup * 16;
#pragma unroll 1
  for (; byte + (kAtOnce - 1) * kStep < end; byte += kAtOnce * kStep) {
    uint4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = *at(byte + i * kStep);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = silu(x[i]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) *at(byte + i * kStep) = x[i];
  }
#pragma unroll 1
  for (; byte < end; byte += kStep) *at(byte) = silu(*at(byte));
}

// Rows of a stage of panels behind `length` become zero.
template <class Panel, int kStage>
__device__ __forceinline__ void clear_behind(unsigned char* stage, int length) {
  for (int byte = static_cast<int>(threadIdx.x) % kWarpgroup * 16; byte < kStage;
       byte += 16 * kWarpgroup)
    if (byte / Panel::kRow % kChunk >= length) *reinterpret_cast<uint4*>(stage + byte) = uint4{};
}

// Sums of squares of the rows that this thread has a part of, to [B, H, T].
template <int kCount>
__device__ __forceinline__ void store_row_squares(const float (&sum)[kCount], const Launch& p,
                                                  const Segment& s, int token) {
  if (p.row_squares == nullptr) return;
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) squares[i % 4 / 2] = fmaf(sum[i], sum[i], squares[i % 4 / 2]);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
      squares[e] += __shfl_xor_sync(0xffffffffu, squares[e], apart);
    const int row = token + accumulator_row(2 * e);
    if (lane_of_warp() % 4 == 0 && row < s.tokens)
      p.row_squares[(static_cast<std::int64_t>(s.batch) * p.heads + s.head) * p.tokens + s.token +
                    row] = squares[e];
  }
}

}  // namespace everlong::lightning::engine
