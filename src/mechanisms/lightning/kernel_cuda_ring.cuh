// One token with the states written behind (CudaRingStep). Memory-bound: a state of K V fp32 is
// read a head, and the ring, against the step's K V read and K V written. Everything that a block
// needs from memory is asked for before the first use of any of it; three to five blocks share a
// processor, so that one's loads hide another's sums.
#pragma once
#include <algorithm>

#include "mechanisms/lightning/kernel_cuda_step.cuh"

namespace everlong::lightning::ring {

using step::Rows;
using step::States;

struct Ring {
  void* data;
  std::int64_t row, head, token;  // strides in elements
};

struct Launch {
  Rows q, k, v, o;  // q.data null: fold all
  States state;
  Ring keys, values;
  const std::int32_t* waiting;
  const std::int64_t* slot;
  std::int64_t rows;  // N
  int K, V, ring;
  bool wide_state, wide_rows;  // the state, all others: can be moved 16 bytes at a time
  float scale;
  float slope[kCudaMaxHeads];
};

// rows x columns in pieces of 16 bytes by kLanes threads a row, under way to shared memory when it
// returns; where pieces do not fit (wide false), element by element, and there when it returns.
template <int kLanes, int kThreads, class Element>
__device__ __forceinline__ void load_rows(Element* to, int pitch, const Element* from,
                                          std::int64_t stride, int rows, int columns, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int piece = wide ? 16 / static_cast<int>(sizeof(Element)) : 1;
  for (int row = static_cast<int>(threadIdx.x) / kLanes; row < rows; row += kThreads / kLanes)
    for (int column = lane * piece; column < columns; column += kLanes * piece) {
      Element* const at = to + row * pitch + column;
      if (wide)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         static_cast<std::uint32_t>(__cvta_generic_to_shared(at))),
                     "l"(from + row * stride + column)
                     : "memory");
      else
        *at = from[row * stride + column];
    }
}

// kCount neighbours in shared memory as fp32, at a multiple of their size or of 16 bytes.
template <int kCount, class Element>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const Element* from) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(Element));
  struct alignas(kBytes < 16 ? kBytes : 16) Piece {
    Element at[kCount];
  };
  const Piece piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(piece.at[i]);
}

// A block: one sequence and head, kColumns columns of the state, two threads a column.
template <class Element, int kColumns>
class Worker {
 public:
  static constexpr int kThreads = 2 * kColumns;
  static constexpr int kLanes = kColumns / 4, kGroups = kThreads / kLanes;  // 4 columns a lane
  static constexpr int kRowsOfThread = 8;                                   // at a time

  // Shared memory; every part starts at a multiple of 16 bytes.
  __host__ __device__ static int padded(int count) { return (count + 15) / 16 * 16; }
  static int bytes(int K, int R) {
    return 4 * (std::max(padded(K), kGroups) * kColumns + 2 * padded(R)) +
           static_cast<int>(sizeof(Element)) * (padded(K) * (1 + R) + R * kColumns);
  }

  __device__ Worker(const Launch& launch, unsigned char* memory)
      : p(launch),
        sequence_(static_cast<int>(blockIdx.x)),
        head_(static_cast<int>(blockIdx.y)),
        first_column_(static_cast<int>(blockIdx.z) * kColumns),
        columns_(min(kColumns, launch.V - first_column_)),
        pitch_(padded(launch.K)) {
    state_ = reinterpret_cast<float*>(memory);
    partial_ = state_;  // once the state has been read
    weight_ = state_ + max(pitch_, kGroups) * kColumns;
    fade_ = weight_ + padded(p.ring);
    q_ = reinterpret_cast<Element*>(fade_ + padded(p.ring));
    keys_ = q_ + pitch_;
    values_ = keys_ + p.ring * pitch_;
  }

  __device__ void run() {
    const bool arrives = p.q.data != nullptr;
    const std::int64_t row = p.slot == nullptr ? sequence_ : p.slot[sequence_];
    if (row < 0 || row >= p.rows) {
      if (arrives && thread() < columns_) output()[thread()] = Element(0.0f);
      return;
    }
    const int waiting = min(max(p.waiting[row], 0), p.ring - 1);
    const int tokens = waiting + arrives;
    load(row, waiting, arrives);
    __syncthreads();
    if (arrives) {
      keep(row, waiting);
      weigh(tokens);
    }
    const bool folds = !arrives || tokens == p.ring;
    const float lost = expm1f(-p.slope[head_] * static_cast<float>(tokens));
    float sum[4] = {};
    for (int first = group() * kRowsOfThread; first < p.K; first += kGroups * kRowsOfThread) {
      if (arrives) multiply(sum, first);
      if (folds) fold(row, tokens, lost, first);
    }
    if (!arrives) return;
    __syncthreads();  // the weights are there, the state has been read
    float recent[4] = {};
    for (int t = group(); t < tokens; t += kGroups) {
      float v[4];
      load_floats(v, values_ + t * kColumns + column());
#pragma unroll
      for (int c = 0; c < 4; ++c) recent[c] = fmaf(weight_[t], v[c], recent[c]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      partial_[group() * kColumns + column() + c] = sum[c] + fmaf(sum[c], lost, recent[c]);
    __syncthreads();
    if (thread() >= columns_) return;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) total += partial_[i * kColumns + thread()];
    output()[thread()] = Element(p.scale * total);
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int group() { return thread() / kLanes; }
  __device__ static int column() { return thread() % kLanes * 4; }
  __device__ const Element* row_of(const Rows& x) const {
    return static_cast<const Element*>(x.data) + sequence_ * x.sequence + head_ * x.head;
  }
  __device__ Element* output() const { return const_cast<Element*>(row_of(p.o)) + first_column_; }
  __device__ Element* ring_of(const Ring& x, std::int64_t row) const {
    return static_cast<Element*>(x.data) + row * x.row + head_ * x.head;
  }
  __device__ float* state_of(std::int64_t row) const {
    return p.state.data + row * p.state.row + head_ * p.state.head + first_column_;
  }

  // The new token joins those that wait.
  __device__ void load(std::int64_t row, int waiting, bool arrives) const {
    constexpr int kRowLanes = 16;
    load_rows<kLanes, kThreads>(state_, kColumns, state_of(row), p.state.key, p.K, columns_,
                                p.wide_state);
    if (arrives) {
      load_rows<kRowLanes, kThreads>(q_, pitch_, row_of(p.q), 0, 1, p.K, p.wide_rows);
      load_rows<kRowLanes, kThreads>(keys_ + waiting * pitch_, pitch_, row_of(p.k), 0, 1, p.K,
                                     p.wide_rows);
      load_rows<kRowLanes, kThreads>(values_ + waiting * kColumns, kColumns,
                                     row_of(p.v) + first_column_, 0, 1, columns_, p.wide_rows);
    }
    load_rows<kRowLanes, kThreads>(keys_, pitch_, ring_of(p.keys, row), p.keys.token, waiting, p.K,
                                   p.wide_rows);
    load_rows<kRowLanes, kThreads>(values_, kColumns, ring_of(p.values, row) + first_column_,
                                   p.values.token, waiting, columns_, p.wide_rows);
    asm volatile("cp.async.commit_group;" ::: "memory");
    const int tokens = waiting + arrives;
    const float rate = -1.44269504f * p.slope[head_];
    for (int i = thread(); i < tokens; i += kThreads)
      fade_[i] = exp2f(rate * static_cast<float>(tokens - 1 - i));
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }

  // The new token to the ring in memory.
  __device__ void keep(std::int64_t row, int waiting) const {
    if (first_column_ == 0)
      for (int i = thread(); i < p.K; i += kThreads)
        ring_of(p.keys, row)[waiting * p.keys.token + i] = keys_[waiting * pitch_ + i];
    if (thread() < columns_)
      ring_of(p.values, row)[waiting * p.values.token + first_column_ + thread()] =
          values_[waiting * kColumns + thread()];
  }

  // weight = lambda^age q . k, by eight neighbouring lanes a token.
  __device__ void weigh(int tokens) const {
    for (int first = 0; first < tokens; first += kThreads / 8) {
      const int i = first + thread() / 8;
      float sum = 0;
      for (int c = thread() % 8 * 8; i < tokens && c < p.K; c += 64) {
        float q[8], k[8];
        load_floats(q, q_ + c);
        load_floats(k, keys_ + i * pitch_ + c);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (c + e < p.K) sum = fmaf(q[e], k[e], sum);
      }
#pragma unroll
      for (int apart = 4; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      if (thread() % 8 == 0 && i < tokens) weight_[i] = sum * fade_[i];
    }
  }

  // kRowsOfThread rows of the state times q.
  __device__ void multiply(float (&sum)[4], int first) const {
    float q[kRowsOfThread];
    load_floats(q, q_ + first);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i)
      if (first + i < p.K) {
        float s[4];
        load_floats(s, state_ + (first + i) * kColumns + column());
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] = fmaf(q[i], s[c], sum[c]);
      }
  }

  // The same rows, moved on by all tokens, to memory.
  __device__ void fold(std::int64_t row, int tokens, float lost, int first) const {
    float added[kRowsOfThread][4] = {};
    for (int t = 0; t < tokens; ++t) {
      float k[kRowsOfThread], v[4];
      load_floats(k, keys_ + t * pitch_ + first);
      load_floats(v, values_ + t * kColumns + column());
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] *= fade_[t];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) added[i][c] = fmaf(k[i], v[c], added[i][c]);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (first + i >= p.K) break;
      float s[4];
      load_floats(s, state_ + (first + i) * kColumns + column());
#pragma unroll
      for (int c = 0; c < 4; ++c) s[c] += fmaf(s[c], lost, added[i][c]);
      float* const to = state_of(row) + (first + i) * p.state.key + column();
      if (p.wide_state) {
        if (column() < columns_)
          *reinterpret_cast<float4*>(to) = make_float4(s[0], s[1], s[2], s[3]);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (column() + c < columns_) to[c] = s[c];
      }
    }
  }

  const Launch& p;
  int sequence_, head_, first_column_, columns_, pitch_;
  float *state_, *weight_, *fade_, *partial_;  // [K, kColumns], [R], [R], [kGroups, kColumns]
  Element *q_, *keys_, *values_;               // [K], [R, K], [R, kColumns]; K padded
};

template <class Element, int kColumns>
__global__ void __launch_bounds__(2 * kColumns) ring_kernel(const __grid_constant__ Launch p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Worker<Element, kColumns>(p, memory).run();
}

}  // namespace everlong::lightning::ring
