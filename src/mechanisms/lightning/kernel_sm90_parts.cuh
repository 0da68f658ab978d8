// What the two Hopper kernels of this room have in common: the moves between registers, tiles and
// states.
#pragma once
#include "mechanisms/lightning/kernel_sm90_work.cuh"

namespace everlong::lightning::engine {

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

// Calls visit(i, address) for every accumulator i, and visit2 for every pair i, i + 1 that lies
// side by side where pairs of the state do, within the state, rows first_row .. + 63. The pointer
// walks: the compiler would keep all the addresses at once. Pairs fill whole sectors of 32 bytes.
template <int kCount, class Visit, class Visit2>
__device__ __forceinline__ void for_state(const StateRows& state, int first_row, const Launch& p,
                                          const Visit& visit, const Visit2& visit2) {
  if (state.data == nullptr) return;
  const int row = first_row + accumulator_row(0), first_column = first_value<2 * kCount>(p),
            columns = p.V - first_column;
  float* at = state.data + row * state.row + (first_column + accumulator_column(0)) * state.column;
  const bool pairs = state.column == 1 && (state.row | p.V) % 2 == 0 &&
                     reinterpret_cast<std::uintptr_t>(state.data) % 8 == 0;
  if (pairs) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4, at += 8) {
      asm volatile("" : "+l"(at));
      if (accumulator_column(i) < columns) {
        if (row < p.K) visit2(i, reinterpret_cast<float2*>(at));
        if (row + 8 < p.K) visit2(i + 2, reinterpret_cast<float2*>(at + 8 * state.row));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4, at += 8 * state.column) {
    asm volatile("" : "+l"(at));
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (row + e / 2 * 8 < p.K && accumulator_column(i + e) < columns)
        visit(i + e, at + e / 2 * 8 * state.row + e % 2 * state.column);
  }
}
template <int kCount>
__device__ __forceinline__ void read_state(float (&sum)[kCount], const StateRows& from,
                                           int first_row, const Launch& p) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
  for_state<kCount>(
      from, first_row, p, [&](int i, const float* at) { sum[i] = *at; },
      [&](int i, const float2* at) {
        const float2 pair = *at;
        sum[i] = pair.x;
        sum[i + 1] = pair.y;
      });
}
template <int kCount>
__device__ __forceinline__ void write_state(const float (&sum)[kCount], const StateRows& to,
                                            int first_row, const Launch& p) {
  for_state<kCount>(
      to, first_row, p, [&](int i, float* at) { *at = sum[i]; },
      [&](int i, float2* at) { *at = make_float2(sum[i], sum[i + 1]); });
}

// This thread's accumulators of rows first_row .. + 63 of a part's state, in fours that lie
// kWarpgroup apart.
template <int kCount>
__device__ __forceinline__ float4* carried_of(const Launch& p, const Segment& s, int part,
                                              int first_row) {
  const int value_block = first_value<2 * kCount>(p) / (2 * kCount);
  const std::int64_t state = static_cast<std::int64_t>(s.unit) * p.parts + part;
  float* const rows = p.carried + state * p.carried_size +
                      p.carried_size / p.value_blocks * value_block + first_row * (2 * kCount);
  return reinterpret_cast<float4*>(rows) + threadIdx.x % kWarpgroup;
}

// The state that a segment starts from. Of parts that hold what they come to by themselves it adds
// up those before its own: chunks of all but the first are full ones (against time, the short one
// is in the first).
template <int kCount>
__device__ __forceinline__ void read_start(float (&sum)[kCount], const Segment& s, int first_row,
                                           const Launch& p) {
  if (!starts_from_parts(p, s)) {
    read_state(sum, start_of(p, s), first_row, p);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
  wait_for_launch_before();
#pragma unroll 1
  for (int part = p.adds_up ? first_part(p, s.part, s.slope) : s.part - 1; part < s.part; ++part) {
    const int tokens = (chunks_before(p, part + 1) - chunks_before(p, part)) * kChunk;
    const float lost = expm1f(-s.slope * static_cast<float>(tokens));
    const float4* const at = carried_of<kCount>(p, s, part, first_row);
    constexpr int kAtOnce = kCount % 32 == 0 ? 8 : 4;  // loads in flight
#pragma unroll
    for (int first = 0; first < kCount / 4; first += kAtOnce) {
      float4 own[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) own[j] = __ldcg(at + (first + j) * kWarpgroup);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        float* const to = &sum[4 * (first + j)];
        to[0] += fmaf(to[0], lost, own[j].x);
        to[1] += fmaf(to[1], lost, own[j].y);
        to[2] += fmaf(to[2], lost, own[j].z);
        to[3] += fmaf(to[3], lost, own[j].w);
      }
    }
  }
}

// The state that it ends with, where that is wanted.
template <int kCount>
__device__ __forceinline__ void write_end(const float (&sum)[kCount], const Segment& s,
                                          int first_row, const Launch& p) {
  if (!p.state_only) {
    write_state(sum, end_of(p, s), first_row, p);
    return;
  }
  float4* const at = carried_of<kCount>(p, s, s.part, first_row);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i)
    at[i * kWarpgroup] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
}

// As bf16 into panels `panel_bytes` apart; this warp's first row lies at `rows` (a multiple of 16
// in its panel).
template <class Panel, int kCount>
__device__ __forceinline__ void write_tile(const float (&sum)[kCount], std::uint32_t rows,
                                           int panel_bytes) {
  const int row = lane_of_warp() % 16, piece = lane_of_warp() / 16;
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i)
    store_pieces(rows + 2 * i / Panel::kPieces * panel_bytes + Panel::place(row, 2 * i + piece),
                 pack(sum[8 * i], sum[8 * i + 1]), pack(sum[8 * i + 2], sum[8 * i + 3]),
                 pack(sum[8 * i + 4], sum[8 * i + 5]), pack(sum[8 * i + 6], sum[8 * i + 7]));
}

// The warp's 16 rows of an output chunk, from first_column on, by way of its own panels `staged`.
// Where a packed sequence ends within them and another may follow, lanes store what is left of
// them.
template <class Panel, int kCount>
__device__ __forceinline__ void store_rows(const float (&sum)[kCount], unsigned char* staged,
                                           const CUtensorMap& map, const OutputRows& rows,
                                           int first_column, int columns, bool packed, int token,
                                           const Segment& s) {
  constexpr int kPanel = kOutRows * Panel::kRow, kColumns = Panel::kRow / 2;
  if (lane_of_warp() == 0) store_wait_read();  // of the chunk before
  __syncwarp();
  write_tile<Panel>(sum, shared_address(staged), kPanel);
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
          staged + piece / Panel::kPieces * kPanel + Panel::place(row, piece);
      if (first_column + piece * 8 < columns)
        *reinterpret_cast<uint4*>(rows.data + (s.token + token + row) * rows.token +
                                  s.head * rows.head + first_column + piece * 8) =
            *reinterpret_cast<const uint4*>(from);
    }
  } else if (lane_of_warp() == 0) {
    for (int panel = 0; panel < Panel::of(2 * kCount); ++panel)
      store_box(&map, staged + panel * kPanel, first_column + panel * kColumns, s.token + token,
                s.head, s.batch);
    store_commit();
  }
}

// What is below 2^-126 becomes 0; else as exp2f().
__device__ __forceinline__ float power_of_2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// scale lambda^|i-j| where j is not later (kReverse: not earlier) than i, in the places of scores.
template <bool kReverse>
__device__ __forceinline__ void fill_decay(float (&decay)[kChunk / 2], float scale, float rate) {
  const float first = static_cast<float>(accumulator_row(0) - accumulator_column(0));
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const int further = i % 4 / 2 * 8 - (i / 4 * 8 + i % 2);  // than the first one, i minus j
    const float i_minus_j = first + static_cast<float>(further);
    const float apart = kReverse ? -i_minus_j : i_minus_j;
    decay[i] = apart >= 0 ? scale * power_of_2(rate * apart) : 0.0f;
  }
}

// What a row of an output takes from the state: a of this thread's two rows. length: of the chunk;
// rows past its end come to nothing against time, as all that is multiplied with theirs is zero.
template <bool kReverse>
__device__ __forceinline__ void fill_from_state(float (&a)[2], float scale, float rate,
                                                int length) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = accumulator_row(2 * e);
    a[e] = kReverse ? exp2f(rate * static_cast<float>(max(length - 1 - row, 0)))
                    : scale * exp2f(rate * static_cast<float>(row + 1));
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

// 64 columns of X from first_column on, as the left operand X^T of a product: this warp has 16 of
// them, all tokens.
class Columns {
 public:
  std::uint32_t x[kChunk / 16][4];  // x[i][e]: tokens of pair[2i + e / 2] in Weights

  template <class Panel>
  __device__ static std::uint32_t address(std::uint32_t tile, int first_column) {
    const int lane = lane_of_warp(), token = lane / 16 * 8 + lane % 8;
    const int piece = first_column / 8 + 2 * warp_of_group() + lane / 8 % 2;
    return tile + piece / Panel::kPieces * kChunk * Panel::kRow + Panel::place(token, piece);
  }
  template <class Panel>
  __device__ void load(std::uint32_t at) {
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) load_transposed(x[i], at + i * 16 * Panel::kRow);
  }
  template <class Panel>
  __device__ void store(std::uint32_t at) const {
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) store_transposed(at + i * 16 * Panel::kRow, x[i]);
  }
};

// sum = lambda^m sum + (diag(w) X)^T Y, for the columns x of X, Y 64 x 2 kCount.
template <class Panel, int kCount, bool kReverse>
__device__ __forceinline__ void add_chunk(float (&sum)[kCount], const Weights<kReverse>& weights,
                                          Columns& columns, std::uint64_t y) {
  auto& x = columns.x;
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] = times(x[i][e], weights.pair[2 * i + e / 2]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = fmaf(sum[i], weights.lost, sum[i]);
  settle(sum);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i) wgmma<1>(sum, x[i], y + Panel::across_k(i), true);
  wgmma_commit();
  wgmma_wait<0>();
  settle(sum);
}
// The same for the 64 columns of the tile X from first_column on.
template <class Panel, int kCount, bool kReverse>
__device__ __forceinline__ void add_chunk(float (&sum)[kCount], const Weights<kReverse>& weights,
                                          std::uint32_t tile, int first_column, std::uint64_t y) {
  Columns columns;
  columns.load<Panel>(Columns::address<Panel>(tile, first_column));
  add_chunk<Panel>(sum, weights, columns, y);
}

}  // namespace everlong::lightning::engine
