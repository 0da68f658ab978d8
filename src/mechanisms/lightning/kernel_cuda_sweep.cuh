// One sweep over the chunks of a head, for every GPU from sm_80 on: the forward pass, and by its
// three other readings each gradient (README section 3). With C tokens a chunk, m <= C in a short
// one, and S before it:
//   O  = ((X Y^T) .* D) Z + diag(a) X S          S' = lambda^m S + (diag(w) Y)^T Z
//   in time       D_ij = scale lambda^(i-j), i >= j;  a_i = scale lambda^(i+1);  w_j =
//   lambda^(m-1-j) against time  D_ij = scale lambda^(j-i), j >= i;  a_i = lambda^(m-1-i);  w_j =
//   scale lambda^(j+1)
// O = o of (q, k, v), dQ of (dO, v, k) with S transposed; against time dV of (k, q, dO), dK of
// (v, dO, q) with R transposed.
//
// A block owns some columns of Z, O and S: S in registers (fp32) and, for X S, once more in shared
// memory as a tile. Blocks share nothing, so every result is the same bits each time.
#pragma once
#include <type_traits>

#include "mechanisms/lightning/kernel_cuda.h"
#include "mechanisms/lightning/kernel_cuda_tiles.cuh"

namespace everlong::lightning::sweep {

struct Rows {
  const void* data;
  std::int64_t batch, token, head;  // strides in elements; the last dimension is contiguous
};
struct States {
  float* data;  // null: zero, not wanted
  std::int64_t sequence, head, row, column;
};

struct Launch {
  Rows x, y, z, o;
  States in, out;  // X rows, Z columns
  std::int64_t tokens;
  int heads, X, Z, column_blocks;
  const std::int32_t* first_token;  // of packed sequences; null: rows of one length
  // Each head of a sequence is cut into `parts`. With more than one the kernel runs twice: first
  // over all parts but the last for the state that each leaves, made from nothing, to `carried`
  // [units, parts, X, Z]; then over all, from what those before them left.
  int parts;
  bool state_only, reverse, aligned;
  float* carried;
  float scale;
  float slope[kCudaMaxHeads];
};

constexpr int kThreads = 256, kWarps = kThreads / 32;

// kX: X padded. The tiles of all shapes fit 99 KB, what a block has on the smallest of these GPUs.
template <class Element, int kX>
struct Sweep {
  static constexpr bool kIsBFloat16 = std::is_same_v<Element, __nv_bfloat16>;
  using Tile = std::conditional_t<kIsBFloat16, __nv_bfloat16, float>;
  using P = Product<Tile, std::is_same_v<Element, float>>;
  static constexpr int kChunk = (kIsBFloat16 ? 64 : 32) / (kX > 128 ? 2 : 1);
  static constexpr int kColumns = kIsBFloat16 ? 64 : 32;
  // Pitches that keep the lanes of a fragment on different banks.
  static constexpr int kPadding = kIsBFloat16 ? 8 : 4;
  static constexpr int kPitchX = kX + kPadding, kPitchP = kChunk + kPadding, kPitchZ = kColumns + 8;

  static constexpr int kUnroll = kX > 64 ? 1 : 2;  // of the loads; as measured

  struct Shared {
    alignas(16) Tile x[kChunk * kPitchX];
    alignas(16) Tile y[kChunk * kPitchX];
    alignas(16) Tile z[2][kChunk * kPitchZ];  // this chunk's and the next one's
    alignas(16) Tile state[kX * kPitchZ];
    alignas(16) Tile scores[kChunk * kPitchP];
    float power[kChunk + 1];  // of lambda
    float weight[kChunk];     // w
  };
  static_assert(sizeof(Shared) <= 99 * 1024);

  // Warps share out a chunk's rows, and columns where rows are fewer.
  static constexpr int kRowWarps = kChunk / 16, kColumnWarps = kWarps / kRowWarps;
  static constexpr int tiles_of_warp(int columns) {
    return (columns / 8 + kColumnWarps - 1) / kColumnWarps;
  }
  static constexpr int kScoreTiles = tiles_of_warp(kChunk), kOutTiles = tiles_of_warp(kColumns);
  // The same for the rows of S.
  static constexpr int kStateWarps = kX / 16 < kWarps ? kX / 16 : kWarps;
  static constexpr int kStateRows = kX / 16 / kStateWarps,
                       kStateTiles = kColumns / 8 / (kWarps / kStateWarps);

  // This block's place.
  struct Place {
    std::int64_t unit, batch, token, tokens;  // its sequence: where it lies, its length
    int sequence, head, part, column;
    std::int64_t chunks;
    __device__ std::int64_t first(int p, int parts) const { return chunks * p / parts; }
  };

  __device__ static Place place_of(const Launch& p) {
    Place at;
    const std::int64_t block = blockIdx.x;
    const int parts = p.state_only ? p.parts - 1 : p.parts;
    at.column = static_cast<int>(block % p.column_blocks) * kColumns;
    at.part = static_cast<int>(block / p.column_blocks % parts);
    at.unit = block / p.column_blocks / parts;
    at.sequence = static_cast<int>(at.unit / p.heads);
    at.head = static_cast<int>(at.unit % p.heads);
    at.batch = p.first_token == nullptr ? at.sequence : 0;
    at.token = p.first_token == nullptr ? 0 : p.first_token[at.sequence];
    at.tokens = p.first_token == nullptr ? p.tokens : p.first_token[at.sequence + 1] - at.token;
    at.chunks = (at.tokens + kChunk - 1) / kChunk;
    return at;
  }

  using State = float[kStateRows][kStateTiles][4];

  // visit(the thread's sums, address) for every pair within the state.
  template <class Visit>
  __device__ static void for_state(State& sum, const States& s, const Launch& p, const Place& at,
                                   const Visit& visit) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int r = 0; r < kStateRows; ++r)
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (warp % kStateWarps * kStateRows + r) * 16 + row_of(i);
          const int column = at.column + (warp / kStateWarps * kStateTiles + n) * 8 + column_of(i);
          if (row < p.X && column < p.Z)
            visit(sum[r][n][i], s.data + row * s.row + column * s.column);
        }
  }
  __device__ static States carried_rows(const Launch& p, const Place& at, int part) {
    const std::int64_t size = static_cast<std::int64_t>(p.X) * p.Z;
    return {p.carried + (at.unit * p.parts + part) * size, 0, 0, p.Z, 1};
  }
  __device__ static States rows_of(const States& all, const Place& at) {
    return {all.data + at.sequence * all.sequence + at.head * all.head, 0, 0, all.row, all.column};
  }

  // What a part starts from.
  __device__ static void read_state(State& sum, const Launch& p, const Place& at) {
#pragma unroll
    for (int r = 0; r < kStateRows; ++r)
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][n][i] = 0.0f;
    if (p.state_only) return;
    if (p.in.data != nullptr)
      for_state(sum, rows_of(p.in, at), p, at, [](float& s, const float* from) { s = *from; });
    for (int part = 0; part < at.part; ++part) {
      const std::int64_t from = at.first(part, p.parts) * kChunk,
                         to = at.first(part + 1, p.parts) * kChunk;
      // Against time the short chunk comes first.
      const std::int64_t missing =
          (p.reverse ? from == 0 : to >= at.tokens) ? at.chunks * kChunk - at.tokens : 0;
      const float tokens = static_cast<float>(to > from ? to - from - missing : 0);
      const float lost = expm1f(-p.slope[at.head] * tokens);
      for_state(sum, carried_rows(p, at, part), p, at,
                [lost](float& s, const float* own) { s = fmaf(s, lost, s) + *own; });
    }
  }

  __device__ static void run(const Launch& p, Shared& shared) {
    const Place at = place_of(p);
    if (at.tokens <= 0) return;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int row0 = warp % kRowWarps * 16, tile0 = warp / kRowWarps;  // of O and of scores
    const float slope = p.slope[at.head], rate = -1.44269504f * slope;
    for (int i = static_cast<int>(threadIdx.x); i <= kChunk; i += kThreads)
      shared.power[i] = exp2f(rate * static_cast<float>(i));
    State sum;
    read_state(sum, p, at);

    const auto start_of = [&](const Rows& rows) {
      return static_cast<const Element*>(rows.data) + at.batch * rows.batch +
             at.token * rows.token + at.head * rows.head;
    };
    const Element *x = start_of(p.x), *y = start_of(p.y), *z = start_of(p.z) + at.column;
    Element* const o = const_cast<Element*>(start_of(p.o)) + at.column;
    const int columns = min(kColumns, p.Z - at.column);

    const auto token_of = [&](std::int64_t chunk) {
      return (p.reverse ? at.chunks - 1 - chunk : chunk) * kChunk;
    };
    const auto length_of = [&](std::int64_t chunk) {
      return static_cast<int>(min(std::int64_t{kChunk}, at.tokens - token_of(chunk)));
    };
    const auto load = [&](std::int64_t chunk) {
      const std::int64_t token = token_of(chunk);
      const int length = length_of(chunk);
      if (!p.state_only)
        load_tile<kChunk, kX, kThreads, kUnroll>(shared.x, kPitchX, x + token * p.x.token,
                                                 p.x.token, length, p.X, p.aligned);
      load_tile<kChunk, kX, kThreads, kUnroll>(shared.y, kPitchX, y + token * p.y.token, p.y.token,
                                               length, p.X, p.aligned);
      load_tile<kChunk, kColumns, kThreads, kUnroll>(shared.z[chunk % 2], kPitchZ,
                                                     z + token * p.z.token, p.z.token, length,
                                                     columns, p.aligned);
    };

    const std::int64_t first = at.first(at.part, p.parts), last = at.first(at.part + 1, p.parts);
    if (first < last) load(first);
    __syncthreads();  // the powers are there
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      const int length = length_of(chunk);
      const Tile* const z_tile = shared.z[chunk % 2];
      for (int j = static_cast<int>(threadIdx.x); j < kChunk; j += kThreads)
        shared.weight[j] = j >= length ? 0.0f
                           : p.reverse ? p.scale * shared.power[j + 1]
                                       : shared.power[length - 1 - j];
      if (!p.state_only) write_state_tile(sum, shared);
      wait_for_tiles();
      __syncthreads();

      float out[kOutTiles][4] = {};
      if (!p.state_only) {
        make_scores(p, shared, row0, tile0);
        multiply<kX, kOutTiles>(out, shared.x + row0 * kPitchX, kPitchX, shared.state, tile0,
                                kColumns);
        const float from_state[2] = {row_factor(p, shared, row0 + row_of(0), length),
                                     row_factor(p, shared, row0 + row_of(2), length)};
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= from_state[i / 2];
      }
      add_chunk(sum, shared, z_tile, expm1f(-slope * static_cast<float>(length)));
      __syncthreads();  // the scores are there; x, y, the weights and the state have been read
      if (chunk + 1 < last) load(chunk + 1);
      if (p.state_only) continue;
      multiply<kChunk, kOutTiles>(out, shared.scores + row0 * kPitchP, kPitchP, z_tile, tile0,
                                  kColumns);
      store_rows(out, p, o + token_of(chunk) * p.o.token, length, columns, row0, tile0);
    }
    if (p.state_only)
      for_state(sum, carried_rows(p, at, at.part), p, at, [](float& s, float* to) { *to = s; });
    else if (p.out.data != nullptr && at.part == p.parts - 1)
      for_state(sum, rows_of(p.out, at), p, at, [](float& s, float* to) { *to = s; });
  }

  __device__ static void store_rows(const float (&out)[kOutTiles][4], const Launch& p, Element* o,
                                    int length, int columns, int row0, int tile0) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = row0 + row_of(i), column = (tile0 + n * kColumnWarps) * 8 + column_of(i);
        if (row >= length || column >= columns) continue;
        Element* const to = o + row * p.o.token + column;
        if (p.aligned) {
          store_pair(to, out[n][i], out[n][i + 1]);
        } else {
          to[0] = as<Element>(out[n][i]);
          if (column + 1 < columns) to[1] = as<Element>(out[n][i + 1]);
        }
      }
  }

  __device__ static float row_factor(const Launch& p, const Shared& shared, int row, int length) {
    if (!p.reverse) return p.scale * shared.power[row + 1];
    return row < length ? shared.power[length - 1 - row] : 0.0f;
  }

  __device__ static void write_state_tile(const State& sum, Shared& shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int r = 0; r < kStateRows; ++r)
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          store_pair(shared.state +
                         ((warp % kStateWarps * kStateRows + r) * 16 + row_of(i)) * kPitchZ +
                         (warp / kStateWarps * kStateTiles + n) * 8 + column_of(i),
                     sum[r][n][i], sum[r][n][i + 1]);
  }

  // sum += 16 rows of `left` [16, kDepth] by tiles tile0, tile0 + kColumnWarps.. of `right`
  // [kDepth, columns], of pitch kPitchZ.
  template <int kDepth, int kTiles>
  __device__ static void multiply(float (&sum)[kTiles][4], const Tile* left, int pitch,
                                  const Tile* right, int tile0, int columns) {
#pragma unroll 4
    for (int k = 0; k < kDepth; k += P::kDepth) {
      const auto a = P::left_by_k(left + k, pitch);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int column = (tile0 + n * kColumnWarps) * 8;
        if (column < columns)
          P::add(sum[n], a, P::right_across_k(right + k * kPitchZ + column, kPitchZ));
      }
    }
  }

  __device__ static void make_scores(const Launch& p, Shared& shared, int row0, int tile0) {
    float sum[kScoreTiles][4] = {};
#pragma unroll 4
    for (int k = 0; k < kX; k += P::kDepth) {
      const auto a = P::left_by_k(shared.x + row0 * kPitchX + k, kPitchX);
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        const int column = (tile0 + n * kColumnWarps) * 8;
        if (column < kChunk)
          P::add(sum[n], a, P::right_by_k(shared.y + column * kPitchX + k, kPitchX));
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = row0 + row_of(i), column = (tile0 + n * kColumnWarps) * 8 + column_of(i);
        if (column >= kChunk) continue;
        float masked[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int apart = p.reverse ? column + e - row : row - column - e;
          masked[e] = apart >= 0 ? sum[n][i + e] * (p.scale * shared.power[apart]) : 0.0f;
        }
        store_pair(shared.scores + row * kPitchP + column, masked[0], masked[1]);
      }
  }

  // A chunk's own part is summed first, then added: what the tensor cores cut off is then small
  // against it, and does not add up over a long stream.
  __device__ static void add_chunk(State& sum, const Shared& shared, const Tile* z, float lost) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int kSteps = kChunk / P::kDepth;
#pragma unroll
    for (int r = 0; r < kStateRows; ++r) {
      const int row = (warp % kStateWarps * kStateRows + r) * 16;
      typename P::Left y[kSteps];
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        y[k] = P::left_across_k(shared.y + k * P::kDepth * kPitchX + row, kPitchX,
                                shared.weight + k * P::kDepth);
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n) {
        const int column = (warp / kStateWarps * kStateTiles + n) * 8;
        float own[4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          P::add(own, y[k], P::right_across_k(z + k * P::kDepth * kPitchZ + column, kPitchZ));
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][n][i] = fmaf(sum[r][n][i], lost, sum[r][n][i]) + own[i];
      }
    }
  }
};

template <class Element, int kX>
__global__ void __launch_bounds__(kThreads, 2) sweep_kernel(const __grid_constant__ Launch p) {
  using S = Sweep<Element, kX>;
  extern __shared__ __align__(16) unsigned char memory[];
  S::run(p, *reinterpret_cast<typename S::Shared*>(memory));
}

}  // namespace everlong::lightning::sweep
