// Work that rides along with the forward pass while memory binds: q, k, v become
// silu(x) = x / (1 + exp(-x)) between the copy that brings a stage and the products that use it,
// and the sums of o^2 that a norm over all heads needs. Each is turned where it passes anyway: q by
// the warpgroup that makes O, on the way into registers; k by those that carry S, which take it
// into registers too and write it back for Q K^T; v in place, by the warps that loading leaves
// idle. A warpgroup of its own for all three costs 10 % for the way through registers alone
// (docs/benchmarks.md).
#pragma once
#include "mechanisms/lightning/kernel_sm90_parts.cuh"

namespace everlong::lightning::engine {

// silu of two neighbours in bf16, as h + h tanh(h) with h = x / 2: one special function a number,
// where an exponential and a reciprocal would bind. tanh.approx is good to 2^-11 of itself, silu so
// to 2^-12 |x|, below the rounding of its neighbours of size |x|.
__device__ __forceinline__ std::uint32_t silu(std::uint32_t pair) {
  const auto turned = [](float half) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
    return fmaf(half, t, half);
  };
  const std::uint32_t halves = times(pair, 0x3f003f00u);
  return pack(turned(__uint_as_float(halves << 16)), turned(__uint_as_float(halves & 0xffff0000u)));
}
template <int kSteps>
__device__ __forceinline__ void silu(std::uint32_t (&x)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] = silu(x[i][e]);
}

// silu of a tile of kBytes in place, by the warps [1, 4) of a warpgroup. Four pieces at once, for
// a warp waits for all that it computes.
template <int kBytes>
__device__ __forceinline__ void silu_of_tile(unsigned char* tile) {
  constexpr int kAtOnce = 4, kStep = 16 * (kWarpgroup - 32);
  const int first = (static_cast<int>(threadIdx.x) % kWarpgroup - 32) * 16;
#pragma unroll 1
  for (int round = first; round < kBytes; round += kAtOnce * kStep) {
    std::uint32_t x[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (const int byte = round + i * kStep; byte < kBytes) {
        const uint4 piece = *reinterpret_cast<const uint4*>(tile + byte);
        x[i][0] = piece.x, x[i][1] = piece.y, x[i][2] = piece.z, x[i][3] = piece.w;
      }
    silu(x);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (const int byte = round + i * kStep; byte < kBytes)
        *reinterpret_cast<uint4*>(tile + byte) = make_uint4(x[i][0], x[i][1], x[i][2], x[i][3]);
  }
}

template <int kKeys>
using Queries = std::uint32_t[kKeys / 16][4];  // a warp's 16 rows of q, as products take them

template <class Panel, int kSteps>
__device__ __forceinline__ void load_queries(std::uint32_t (&queries)[kSteps][4],
                                             std::uint32_t tile) {
  const int lane = lane_of_warp(), row = warp_of_group() * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int piece = 2 * i + lane / 16;
    load_pieces(queries[i],
                tile + piece / Panel::kPieces * kChunk * Panel::kRow + Panel::place(row, piece));
  }
}

// What is left of two tokens next to each other, of which `left` belong to the sequence.
__device__ __forceinline__ std::uint32_t first_of(std::uint32_t pair, int left) {
  return left >= 2 ? pair : left == 1 ? pair & 0xffffu : 0;
}

// Turns v in place, and clears what lies behind `length` tokens. By the warps [1, 4) of a
// warpgroup.
template <class Panel, int kBytes>
__device__ __forceinline__ void turn_values(unsigned char* tile, bool with_silu, int length) {
  if (with_silu) silu_of_tile<kBytes>(tile);
  if (length < kChunk)
    for (int byte = (static_cast<int>(threadIdx.x) % kWarpgroup - 32) * 16; byte < kBytes;
         byte += 16 * (kWarpgroup - 32))
      if (byte / Panel::kRow % kChunk >= length) *reinterpret_cast<uint4*>(tile + byte) = uint4{};
}

// Turns the columns of k that a warp has in registers, there and in the tile, at `at`, and clears
// what lies behind `length` tokens.
template <class Panel>
__device__ __forceinline__ void turn_keys(Columns& columns, std::uint32_t at, bool with_silu,
                                          int length) {
  auto& x = columns.x;
  if (with_silu) silu(x);
  if (length < kChunk)
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i)
      x[i / 4][i % 4] = first_of(x[i / 4][i % 4], length - accumulator_column(4 * (i / 2)));
  if (with_silu || length < kChunk) {
    columns.store<Panel>(at);
    shared_writes_fence();
  }
}

// Where the row squares of a segment begin; null: not wanted.
__device__ __forceinline__ float* row_squares_of(const Launch& p, const Segment& s) {
  if (p.row_squares == nullptr) return nullptr;
  const std::int64_t unit = static_cast<std::int64_t>(s.batch) * p.heads + s.head;
  return p.row_squares + unit * p.tokens + s.token;
}

// Sums of squares of the rows that this thread has a part of, in fours, which do not wait for each
// other.
template <int kCount>
__device__ __forceinline__ void store_row_squares(const float (&sum)[kCount], float* to, int token,
                                                  int tokens) {
  if (to == nullptr) return;
  float parts[8] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) parts[i % 8] = fmaf(sum[i], sum[i], parts[i % 8]);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float squares = (parts[2 * e] + parts[2 * e + 1]) + (parts[2 * e + 4] + parts[2 * e + 5]);
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, apart);
    const int row = token + accumulator_row(2 * e);
    if (lane_of_warp() % 4 == 0 && row < tokens) to[row] = squares;
  }
}

}  // namespace everlong::lightning::engine
