// What the kernel's host side (kernel_cpu.cpp) and its SIMD side (kernel_cpu_simd.cpp) agree on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace everlong::lightning::cpu {

// Tokens of a chunk: one vector of scores. 32 were 2 to 8 % slower at K = V = 64 and 128, 64 up to
// 25 %: scores grow with the chunk, and reading and writing S once a chunk hides behind the
// products.
inline constexpr std::int64_t kChunk = 16;
// Sizes in the workspace are multiples of the widest vector, whatever the machine has.
inline constexpr std::int64_t kLanes = 16;
constexpr std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Row strides of what a product reads a number at a time, known to the compiler: it addresses the
// rows of a tile from one pointer. Not a multiple of 4 KB, or the rows would share cache sets.
inline constexpr std::int64_t kQueryStride = 256 + kLanes;
inline constexpr std::int64_t kScoreStride = kChunk + kLanes;

// Decays of one head: [t] = exp(-s (kChunk - t)) for t <= kChunk, then zeros. So
// exp(-s n) = [kChunk - n], and a row i of the mask D_ij begins at [kChunk - i].
inline constexpr std::int64_t kDecays = 2 * kChunk + kLanes;

// Heads whose states one sweep may keep, by the bytes of the states: half a second-level cache.
// What lies side by side in memory is then read side by side: a head alone reads 512 bytes of every
// page, which no hardware prefetcher follows.
inline constexpr std::int64_t kStatesBytes = std::int64_t{1} << 19;
inline constexpr std::int64_t kMostHeads = 16;
constexpr std::int64_t heads_together(std::int64_t heads, std::int64_t key_dim,
                                      std::int64_t value_dim) {
  const std::int64_t fitting = kStatesBytes / (padded(key_dim) * padded(value_dim) * 4);
  const std::int64_t most = heads < kMostHeads ? heads : kMostHeads;
  return fitting < 1 ? 1 : fitting < most ? fitting : most;
}

// Floats that one thread works in: S of each head; q, k twice, v, scores; the same for p and what
// crosses chunks.
constexpr std::int64_t sweep_floats(std::int64_t key_dim, std::int64_t value_dim,
                                    std::int64_t heads) {
  const std::int64_t K = padded(key_dim), V = padded(value_dim);
  return heads * K * V + kChunk * (2 * (kQueryStride + kScoreStride) + 5 * K + 3 * V);
}

// Tokens of one head of one sequence, or one token with stride 1.
template <class Void>
struct Rows {
  Void* data = nullptr;
  std::int64_t stride = 0;  // elements from one token to the next; negative: backwards in time
};
// One [K, V] matrix; either stride may be 1, so that S and its transpose are both at hand.
template <class Float>
struct Matrix {
  Float* data = nullptr;  // null: zero, or not wanted
  std::int64_t row_stride = 0, col_stride = 1;
};

// One pass over the tokens of one head of one sequence, S = state:
//
//   o_t = cross(q_t, S before t's chunk) + inside its chunk, as in README.md section 2
//   p_t = the same for S^T: u instead of q, v and k exchanged
//
// The forward pass and the gradients are such passes; those of k and v go backwards in time, where
// they need one state, R = dL/dS after the chunk:
//
//               q   k   v    u      S     lead  direction
//   o           q   k   v           S      1    forwards
//   o = grad q  dO  v   k           S^T    1    forwards
//   o = grad v, k   q   dO   v      R      0    backwards
//   p = grad k
//
// lead: how many tokens' decay lies between a state and the first token that reads it.
struct Sweep {
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0, key_dim = 0, value_dim = 0;
  Rows<const void> q, k, v, u;
  Rows<void> o, p;  // absent: not wanted, then q or u is not read
  // Write past the caches; then every row is 64-byte aligned.
  bool stream_o = false, stream_p = false;
  Matrix<const float> state_in;
  Matrix<float> state_out;
  const float* decays = nullptr;  // kDecays of them
  double slope = 0;
  int lead = 1;
  float score_scale = 1, cross_scale = 1, update_scale = 1;
};

// One token of one head of one sequence; columns [0, value_dim) of the state.
struct Step {
  DType dtype = DType::kFloat32;
  std::int64_t key_dim = 0, value_dim = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* o = nullptr;
  const float* state_in = nullptr;  // null: zero
  float* state_out = nullptr;       // null: not wanted
  std::int64_t in_stride = 0, out_stride = 0;
  float lost = 0;  // expm1(-s)
  float scale = 1;
  bool dither = false;  // of long memory: see StepColumns
};

// One sweep over the same tokens of each head, chunk by chunk: at least one head, and nothing but
// pointers, slopes and decays may differ among them. For the best instruction set that the machine
// has. scratch: sweep_floats, 64-byte aligned.
void run_sweep(std::span<const Sweep> heads, float* scratch);
void run_step(const Step& step);

}  // namespace everlong::lightning::cpu
