// What the two Hopper kernels of this room have in common: how chunks are shared out among blocks,
// and how a block's tiles come in.
#pragma once
#include "kernels/cuda/hopper.cuh"
#include "mechanisms/lightning/kernel_cuda.h"

namespace everlong::lightning::engine {

using namespace hopper;

constexpr int kChunk = 64;
constexpr int kOutRows = 16;  // of an output, stored by one warp at a time
constexpr int kMaxRanges = 264;

// Columns of a panel (hopper.cuh).
constexpr int panel_columns(int keys, int values) { return keys == 96 && values == 96 ? 32 : 64; }
constexpr int groups_of(int rows) { return (rows + 63) / 64; }  // of 64 rows, a warpgroup's

// What lies further back counts less than 2^-30.
constexpr double kHorizonNats = 30 * 0.69314718055994531;

// Chunks from which a state is warmed up, however long the past is.
inline __host__ __device__ int warm_chunks(float slope) {
  const float chunks = static_cast<float>(kHorizonNats) / (slope * kChunk);  // infinite for 0
  return static_cast<int>(chunks < 1e9f ? chunks : 1e9f) + 1;
}

struct StateRows {
  float* data;
  std::int64_t sequence, head, row, column;  // strides in elements
};

struct OutputRows {
  __nv_bfloat16* data;
  std::int64_t token, head;  // strides in elements
};

// All chunks on one line: unit by unit, a unit is one head of one sequence, its chunks in the order
// in which they are worked off.
struct Launch {
  StateRows in, out;                // data null: zero, not wanted
  int tokens, heads, chunks, K, V;  // of rows of one length; chunks: of a unit
  // Packed sequences, [sequences + 1] each: the first token, and the chunks of a head before it.
  // Null: rows of one length.
  const std::int32_t *first_token, *first_chunk;
  int sequences;
  // ranges > 0: block i takes [cut[i], cut[i+1]) of the line, and warms its state up where that
  // starts within a unit. Else each unit is cut into `parts`, a block takes one of them: first all
  // but the last part, where only the state is wanted, from nothing; later each part from the state
  // that `carried` [units, parts, carried_size] then holds. The first is not needed when parts = 1.
  int ranges, parts;
  int value_blocks;        // neighbouring blocks take the columns of V in turn, of the same chunks
  bool state_only, exact;  // exact: a part's own state is made from all its chunks
  // carried holds what each part comes to by itself, from a launch that may not have ended yet; a
  // block adds up those that reach its own part.
  bool adds_up;
  float* carried;  // states as a warpgroup's accumulators (kernel_sm90_parts.cuh)
  int carried_size;
  // Of the forward pass alone: q, k, v become x / (1 + exp(-x)) as they are read; null or
  // [B, H, T]: sums of o^2 over a row, before it is rounded.
  bool silu_q, silu_k, silu_v;
  float* row_squares;
  float scale;
  float slope[kCudaMaxHeads];
  int cut[kMaxRanges + 1];
};

// The part of a block's range that lies in one unit.
struct Segment {
  int unit, sequence, head, part;
  int batch, token, tokens, chunks;  // of its sequence: where it lies, its first token, its size
  int begin, first, last;  // chunks [begin, first) are only for the state, [first, last) for all
  float slope;
};

// The chunks of a unit before a part.
inline __host__ __device__ int chunks_before(const Launch& p, int part) {
  return static_cast<int>(static_cast<std::int64_t>(p.chunks) * part / p.parts);
}
// The first part that reaches the start of `part`.
inline __host__ __device__ int first_part(const Launch& p, int part, float slope) {
  if (p.exact) return 0;
  const int start = chunks_before(p, part), warm = warm_chunks(slope);
  int first = part;
  while (first > 0 && start - chunks_before(p, first) < warm) --first;
  return first;
}

class Walk {
 public:
  __device__ explicit Walk(const Launch& launch) : p(launch) {
    const int block = static_cast<int>(blockIdx.x) / p.value_blocks;
    if (p.ranges > 0) {
      position_ = p.cut[block];
      end_ = p.cut[block + 1];
      if (p.first_chunk != nullptr) find_sequence();
      return;
    }
    const int blocks = p.state_only ? p.parts - 1 : p.parts, unit = block / blocks;
    part_ = block % blocks;
    position_ = unit * p.chunks + chunks_before(p, part_);
    end_ = unit * p.chunks + chunks_before(p, part_ + 1);
  }
  __device__ bool next(Segment& s) {
    if (position_ >= end_) return false;
    if (p.first_chunk == nullptr) {
      s.unit = position_ / p.chunks;
      s.sequence = s.batch = s.unit / p.heads;
      s.head = s.unit % p.heads;
      s.token = 0;
      s.tokens = p.tokens;
      s.chunks = p.chunks;
      s.first = position_ - s.unit * p.chunks;
    } else {
      while (position_ >= p.first_chunk[sequence_ + 1] * p.heads) ++sequence_;
      const int before = p.first_chunk[sequence_];
      s.unit = 0;
      s.sequence = sequence_;
      s.batch = 0;
      s.token = p.first_token[sequence_];
      s.tokens = p.first_token[sequence_ + 1] - s.token;
      s.chunks = p.first_chunk[sequence_ + 1] - before;
      s.head = (position_ - before * p.heads) / s.chunks;
      s.first = position_ - before * p.heads - s.head * s.chunks;
    }
    s.part = part_;
    s.slope = p.slope[s.head];
    s.last = min(s.chunks, s.first + end_ - position_);
    s.begin = s.first;
    position_ += s.last - s.first;
    if (p.state_only) s.first = s.last;
    if (p.ranges > 0)
      s.begin = max(0, s.first - warm_chunks(s.slope));
    else if (p.state_only && !p.exact)
      s.begin = max(s.begin, s.last - warm_chunks(s.slope));
    return true;
  }

 private:
  __device__ void find_sequence() {  // the last one that starts at or before position_
    int low = 0, high = p.sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (p.first_chunk[middle] * p.heads <= position_ ? low : high) = middle;
    }
    sequence_ = low;
  }

  const Launch& p;
  int position_, end_, part_ = 0, sequence_ = 0;
};

// The first token of a chunk, counted from that of its sequence, and how many it has.
template <bool kReverse>
__device__ int token_of(const Segment& s, int chunk) {
  return (kReverse ? s.chunks - 1 - chunk : chunk) * kChunk;
}
template <bool kReverse>
__device__ int length_of(const Segment& s, int chunk) {
  return min(kChunk, s.tokens - token_of<kReverse>(s, chunk));
}

// The first column of V of this block.
template <int kValues>
__device__ __forceinline__ int first_value(const Launch& p) {
  return p.value_blocks == 1 ? 0 : static_cast<int>(blockIdx.x) % p.value_blocks * kValues;
}

// Which stage comes next, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Whether a segment starts from what `carried` holds.
__device__ __forceinline__ bool starts_from_parts(const Launch& p, const Segment& s) {
  return s.part > 0 && !p.state_only;
}
// Else the state that it starts from, and where the one it ends with goes; data null: neither.
__device__ __forceinline__ StateRows of_segment(StateRows rows, const Segment& s) {
  if (rows.data != nullptr) rows.data += s.sequence * rows.sequence + s.head * rows.head;
  return rows;
}
__device__ __forceinline__ StateRows start_of(const Launch& p, const Segment& s) {
  return s.begin > 0 ? StateRows{} : of_segment(p.in, s);
}
__device__ __forceinline__ StateRows end_of(const Launch& p, const Segment& s) {
  return s.last < s.chunks ? StateRows{} : of_segment(p.out, s);
}

// Past the end of a packed sequence lies the next one: there the rows of a stage are cleared (0
// times infinity would be no zero), by a warp of their own, so that loads go on meanwhile. The same
// for stages that are turned into something else before they are used (kernel_sm90_fused.cuh).
template <int kStages>
struct Barriers {
  std::uint64_t full[kStages], empty[kStages];
  std::uint64_t loaded[kStages];  // there, but not cleared or turned yet
  std::uint64_t state_full, state_empty;

  __device__ void init(int stage_writers, int stage_readers, int state_writers,
                       int state_readers) {  // warps; of a stage, after the copy: 1 for none
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], stage_writers);
      barrier_init(&empty[i], stage_readers);
      barrier_init(&loaded[i], 1);
    }
    barrier_init(&state_full, state_writers);
    barrier_init(&state_empty, state_readers);
    barrier_init_fence();
  }
  // The barrier that copies of this stage complete on, told of their bytes. By one thread.
  __device__ std::uint64_t* expect(int stage, int bytes, bool is_raw) {
    std::uint64_t* const barrier = is_raw ? &loaded[stage] : &full[stage];
    barrier_arrive_expecting(barrier, bytes);
    return barrier;
  }
};

template <bool kReverse>
__device__ __forceinline__ bool is_tail(const Launch& p, const Segment& s, int chunk) {
  return p.first_chunk != nullptr && length_of<kReverse>(s, chunk) < kChunk;
}

// By one warp.
template <bool kReverse, class Panel, int kStages, int kStage>
__device__ __forceinline__ void clear_tails(const Launch& p,
                                            unsigned char (&stages)[kStages][kStage],
                                            Barriers<kStages>& barriers) {
  if (p.first_chunk == nullptr) return;
  Ring<kStages> ring;
  std::uint32_t parities = 0;  // bit i: of loaded[i]
  Walk walk(p);
  for (Segment s; walk.next(s);)
#pragma unroll 1
    for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
      if (!is_tail<kReverse>(p, s, chunk)) continue;
      barrier_wait(&barriers.loaded[ring.stage], parities >> ring.stage & 1);
      parities ^= 1u << ring.stage;
      const int length = length_of<kReverse>(s, chunk), lane = static_cast<int>(threadIdx.x) % 32;
      constexpr int kPanel = kChunk * Panel::kRow;
      for (int panel = 0; panel < kStage; panel += kPanel)
        for (int at = length * Panel::kRow + lane * 16; at < kPanel; at += 32 * 16)
          *reinterpret_cast<uint4*>(stages[ring.stage] + panel + at) = uint4{};
      shared_writes_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(&barriers.full[ring.stage]);
    }
}

}  // namespace everlong::lightning::engine
