// What the kernels of one token have in common: how a block goes through its part of a state.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mechanisms/lightning/kernel_cuda.h"

namespace everlong::lightning::step {

struct Rows {
  const void* data;
  std::int64_t sequence, head;  // strides in elements
};
struct States {
  float* data;
  std::int64_t row, head, key;  // strides in elements
};
inline Rows rows_of(const ConstTensorView& x) { return {x.data, x.strides[0], x.strides[2]}; }
inline States states_of(const ConstTensorView& x) {
  return {static_cast<float*>(const_cast<void*>(x.data)), x.strides[0], x.strides[1], x.strides[2]};
}

// Columns of one CTA: 256 bytes of every state row; 128 and 512 are 2 to 4 % slower. Short pieces
// of a row leave many CTAs, so that a single session fills the GPU as well. The number does not
// depend on the batch, hence neither does the order of any sum.
constexpr int kColumns = 64;
constexpr int kThreads = 256;
constexpr int kRowsInFlight = 8;  // loads of a thread before its first store
constexpr int kPartials = kThreads / 32 * kColumns;

template <class Element>
__device__ float load(const Rows& x, std::int64_t offset) {
  return static_cast<float>(static_cast<const Element*>(x.data)[offset]);
}

// Lanes hold kWidth columns each, groups of lanes take the key rows in turn.
template <int kWidth>
struct alignas(4 * kWidth) Words {
  static constexpr int kLanes = kColumns / kWidth, kGroups = kThreads / kLanes;
  float at[kWidth];
};

// Rows first, first + kGroups.. of the state at `from` (null: zero), of which `keys` are there.
template <int kWidth>
__device__ __forceinline__ void fetch(Words<kWidth> (&to)[kRowsInFlight], const float* from,
                                      std::int64_t stride, int first, int keys) {
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int r = first + i * Words<kWidth>::kGroups;
    if (from != nullptr && r < keys)
      to[i] = *reinterpret_cast<const Words<kWidth>*>(from + r * stride);
    else
      to[i] = {};
  }
}

// The sums of all groups, for thread i < kColumns of column i; partial: a row of kColumns for each
// warp, in shared memory.
template <int kBlock, int kWidth>
__device__ __forceinline__ float sum_of_groups(Words<kWidth>& sum, float* partial) {
  constexpr int kLanes = Words<kWidth>::kLanes, kEach = kLanes > 32 ? kLanes : 32;
#pragma unroll
  for (int c = 0; c < kWidth; ++c)
#pragma unroll
    for (int apart = kLanes; apart < 32; apart *= 2)
      sum.at[c] += __shfl_xor_sync(0xffffffffu, sum.at[c], apart);
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      partial[threadIdx.x / kEach * kColumns + threadIdx.x % kLanes * kWidth + c] = sum.at[c];
  }
  __syncthreads();
  float total = 0;
  if (threadIdx.x < kColumns) {
#pragma unroll
    for (int i = 0; i < kBlock / kEach; ++i) total += partial[i * kColumns + threadIdx.x];
  }
  return total;
}

// Whether rows of the states can be moved 16 bytes at a time.
template <class View>
bool is_wide(const View& x) {
  const auto& s = x.strides;
  return !x || (reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.sizes[3] % 4 == 0 &&
                s[0] % 4 == 0 && s[1] % 4 == 0 && s[2] % 4 == 0);
}

}  // namespace everlong::lightning::step
