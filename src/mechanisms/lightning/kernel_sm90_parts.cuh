// What the two Hopper kernels of this room have in common: how chunks are shared out among blocks,
// and the moves between registers, tiles and states.
#pragma once
#include "kernels/cuda/hopper.cuh"
#include "mechanisms/lightning/kernel_cuda.h"

namespace everlong::lightning::engine {

using namespace hopper;

constexpr int kChunk = 64;
constexpr int kPanel = kChunk * 128;  // bytes of 64 tokens x 64 columns
constexpr int kOutRows = 16;          // of an output, stored by one warp at a time
constexpr int kOutPanel = kOutRows * 128;
constexpr int kMaxRanges = 264;

constexpr int panels_of(int columns) { return (columns + 63) / 64; }

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
  // that `carried` [units, parts, K, V] then holds. The first is not needed when parts = 1.
  int ranges, parts;
  bool state_only, exact;  // exact: a part's own state is made from all its chunks
  float* carried;
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

class Walk {
 public:
  __device__ explicit Walk(const Launch& launch) : p(launch) {
    const int block = static_cast<int>(blockIdx.x);
    if (p.ranges > 0) {
      position_ = p.cut[block];
      end_ = p.cut[block + 1];
      if (p.first_chunk != nullptr) find_sequence();
      return;
    }
    const int blocks = p.state_only ? p.parts - 1 : p.parts, unit = block / blocks;
    part_ = block % blocks;
    const std::int64_t chunks = p.chunks;
    position_ = unit * p.chunks + static_cast<int>(chunks * part_ / p.parts);
    end_ = unit * p.chunks + static_cast<int>(chunks * (part_ + 1) / p.parts);
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

// Which stage comes next, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ StateRows carried_rows(const Launch& p, const Segment& s, int part) {
  const std::int64_t size = static_cast<std::int64_t>(p.K) * p.V;
  return {p.carried + (static_cast<std::int64_t>(s.unit) * p.parts + part) * size, 0, 0, p.V, 1};
}
// The state that a segment starts from, and where the one it ends with goes; data null: neither.
__device__ __forceinline__ StateRows start_of(const Launch& p, const Segment& s) {
  StateRows rows = p.in;
  if (s.begin > 0)
    rows = p.ranges > 0 || p.state_only ? StateRows{} : carried_rows(p, s, s.part - 1);
  if (rows.data != nullptr) rows.data += s.sequence * rows.sequence + s.head * rows.head;
  return rows;
}
__device__ __forceinline__ StateRows end_of(const Launch& p, const Segment& s) {
  StateRows rows = p.state_only ? carried_rows(p, s, s.part) : p.out;
  if (!p.state_only && s.last != s.chunks) rows = StateRows{};
  if (rows.data != nullptr) rows.data += s.sequence * rows.sequence + s.head * rows.head;
  return rows;
}

// Runs load(barrier) for a stage of kBytes, of which it loads `bytes`, so that `full` completes
// when they are there; by one warp. Past the end of a packed sequence lies the next one: there the
// rows are cleared first, panel by panel (0 times infinity would be no zero).
template <int kBytes, class Load>
__device__ __forceinline__ void fill_stage(unsigned char* stage, std::uint64_t* full,
                                           std::uint64_t* tail, std::uint32_t& tail_parity,
                                           int bytes, int length, bool packed, const Load& load) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool clear = packed && length < kChunk;
  if (lane == 0) {
    barrier_arrive_expecting(clear ? tail : full, bytes);
    load(clear ? tail : full);
  }
  if (!clear) return;
  barrier_wait(tail, tail_parity);
  tail_parity ^= 1;
  for (int panel = 0; panel < kBytes; panel += kPanel)
    for (int at = length * 128 + lane * 16; at < kPanel; at += 32 * 16)
      *reinterpret_cast<uint4*>(stage + panel + at) = uint4{};
  shared_writes_fence();
  __syncwarp();
  if (lane == 0) barrier_arrive(full);
}

// --- accumulators: 64 rows of a warpgroup; this thread holds rows row, row + 8 ------------------

__device__ __forceinline__ int warp_of_group() { return static_cast<int>(threadIdx.x) / 32 % 4; }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int accumulator_row(int i) {
  return warp_of_group() * 16 + lane_of_warp() / 4 + i % 4 / 2 * 8;
}
__device__ __forceinline__ int accumulator_column(int i) {
  return i / 4 * 8 + lane_of_warp() % 4 * 2 + i % 2;
}

// The compiler may not move a use of these registers above this point.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Calls visit(i, address) for every accumulator i whose place lies within the state, rows first_row
// .. + 63. The pointer walks: the compiler would keep all the addresses at once.
template <int kCount, class Visit>
__device__ __forceinline__ void for_state(const StateRows& state, int first_row, const Launch& p,
                                          const Visit& visit) {
  if (state.data == nullptr) return;
  const int row = first_row + accumulator_row(0);
  float* at = state.data + row * state.row + accumulator_column(0) * state.column;
#pragma unroll
  for (int i = 0; i < kCount; i += 4, at += 8 * state.column) {
    asm volatile("" : "+l"(at));
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (row + e / 2 * 8 < p.K && accumulator_column(i + e) < p.V)
        visit(i + e, at + e / 2 * 8 * state.row + e % 2 * state.column);
  }
}
template <int kCount>
__device__ __forceinline__ void read_state(float (&sum)[kCount], const StateRows& from,
                                           int first_row, const Launch& p) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
  for_state<kCount>(from, first_row, p, [&](int i, const float* at) { sum[i] = *at; });
}
template <int kCount>
__device__ __forceinline__ void write_state(const float (&sum)[kCount], const StateRows& to,
                                            int first_row, const Launch& p) {
  for_state<kCount>(to, first_row, p, [&](int i, float* at) { *at = sum[i]; });
}

// As bf16 into swizzled panels `panel_bytes` apart; this warp's first row lies at `rows` (of a
// panel that starts at a multiple of 1024 bytes; the row is a multiple of 16).
template <int kCount>
__device__ __forceinline__ void write_tile(const float (&sum)[kCount], std::uint32_t rows,
                                           int panel_bytes) {
  const int row = lane_of_warp() % 16, piece = lane_of_warp() / 16;
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i)
    store_pieces(rows + row * 128 + i / 4 * panel_bytes + (((2 * i + piece) ^ row) & 7) * 16,
                 pack(sum[8 * i], sum[8 * i + 1]), pack(sum[8 * i + 2], sum[8 * i + 3]),
                 pack(sum[8 * i + 4], sum[8 * i + 5]), pack(sum[8 * i + 6], sum[8 * i + 7]));
}

// The warp's 16 rows of an output chunk, by way of its own panels `staged`. Where a packed sequence
// ends within them and another may follow, lanes store what is left of them.
template <int kCount>
__device__ __forceinline__ void store_rows(const float (&sum)[kCount], unsigned char* staged,
                                           const CUtensorMap& map, const OutputRows& rows,
                                           int columns, bool packed, int token, const Segment& s) {
  if (lane_of_warp() == 0) store_wait_read();  // of the chunk before
  __syncwarp();
  write_tile(sum, shared_address(staged), kOutPanel);
  shared_writes_fence();
  __syncwarp();
  token += warp_of_group() * kOutRows;
  const int left = s.tokens - token;
  if (packed && left < kOutRows) {
    constexpr int kPieces = kCount / 4;  // of 16 bytes in a row
#pragma unroll 1
    for (int i = lane_of_warp(); i < left * kPieces; i += 32) {
      const int row = i / kPieces, piece = i % kPieces;
      const unsigned char* from =
          staged + piece / 8 * kOutPanel + row * 128 + ((piece ^ row) & 7) * 16;
      if (piece * 8 < columns)
        *reinterpret_cast<uint4*>(rows.data + (s.token + token + row) * rows.token +
                                  s.head * rows.head + piece * 8) =
            *reinterpret_cast<const uint4*>(from);
    }
  } else if (lane_of_warp() == 0) {
    for (int panel = 0; panel < (kCount + 31) / 32; ++panel)
      store_box(&map, staged + panel * kOutPanel, panel * 64, s.token + token, s.head, s.batch);
    store_commit();
  }
}

// scale lambda^|i-j| where j is not later (kReverse: not earlier) than i, in the places of scores.
template <bool kReverse>
__device__ __forceinline__ void fill_decay(float (&decay)[kChunk / 2], float scale, float rate) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const int i_minus_j = accumulator_row(i) - accumulator_column(i);
    const int apart = kReverse ? -i_minus_j : i_minus_j;
    decay[i] = apart >= 0 ? scale * exp2f(rate * static_cast<float>(apart)) : 0.0f;
  }
}

using Scores = std::uint32_t[kChunk / 16][4];  // 64 x 64 in bf16, as a left operand

__device__ __forceinline__ void mask_scores(Scores& to, const float (&scores)[kChunk / 2],
                                            const float (&decay)[kChunk / 2]) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; i += 2)
    to[i / 8][i % 8 / 2] = pack(scores[i] * decay[i], scores[i + 1] * decay[i + 1]);
}

// What a chunk adds to a state: w of each token, and what the state loses over it.
template <bool kReverse>
class Weights {
 public:
  std::uint32_t pair[kChunk / 8];  // tokens 8i + 2 (lane % 4), + 1
  float lost;                      // S moves by what it loses: 4e-8 a token is not rounded away

  // Only a tail is of another length.
  __device__ void fit(int length, float slope, float scale) {
    if (length == length_) return;
    length_ = length;
    lost = expm1f(-slope * static_cast<float>(length));
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i) {
      float w[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = accumulator_column(4 * i) + e;
        const int apart = kReverse ? token + 1 : length - 1 - token;
        w[e] = token < length ? exp2f(-1.44269504f * slope * static_cast<float>(apart)) : 0.0f;
        if constexpr (kReverse) w[e] *= scale;
      }
      pair[i] = pack(w[0], w[1]);
    }
  }

 private:
  int length_ = 0;
};

// sum = lambda^m sum + (diag(w) X)^T Y, for the 64 columns of X in `panel`, Y 64 x 2 kCount.
template <int kCount, bool kReverse>
__device__ __forceinline__ void add_chunk(float (&sum)[kCount], const Weights<kReverse>& weights,
                                          std::uint32_t panel, std::uint64_t y) {
  const int lane = lane_of_warp();
  const int token = lane / 16 * 8 + lane % 8, piece = 2 * warp_of_group() + lane / 8 % 2;
  const std::uint32_t at = panel + token * 128 + ((piece ^ token) & 7) * 16;
  std::uint32_t x[kChunk / 16][4];
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i) {
    load_transposed(x[i], at + i * 2048);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] = times(x[i][e], weights.pair[2 * i + e / 2]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = fmaf(sum[i], weights.lost, sum[i]);
  settle(sum);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i) wgmma<1>(sum, x[i], y + i * kNextRows, true);
  wgmma_commit();
  wgmma_wait<0>();
  settle(sum);
}

}  // namespace everlong::lightning::engine
