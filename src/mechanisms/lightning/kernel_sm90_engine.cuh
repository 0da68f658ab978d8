// The forward pass on Hopper. With C = 64 tokens a chunk, m <= C in a sequence's last (README
// section 2):
//   O  = ((Q K^T) .* D) V + diag(a) Q S,   D_ij = scale lambda^(i-j), i >= j; a_i = scale
//   lambda^(i+1) S' = lambda^m S + (diag(w) K)^T V,     w_j = lambda^(m-1-j)
// Warpgroups: one thread of the first copies tiles in, the second makes O, the others hold the rows
// of S (fp32, in registers, 64 each) and leave a bf16 copy in shared memory for Q S.
// Bound by memory: 1024 bytes a token and head at K = V = 128 against 98 kFLOP.
#pragma once
#include "mechanisms/lightning/kernel_sm90_fused.cuh"
#include "mechanisms/lightning/kernel_sm90_shape.cuh"

namespace everlong::lightning::engine {

// kFused: with what kernel_sm90_fused.cuh adds. Each warpgroup then turns what passes it, and a
// stage is full once k and v are turned; the one that makes O takes q into registers.
// kReverse: against time, as the gradients of v, from (K, Q, dO), and of k, from (V, dO, Q), are
// made where one pass cannot hold both (kernel_sm90_gradients.cuh has the formulas).
template <int kKeys, int kValues, bool kFused, bool kReverse>
struct Forward {
  static_assert(!(kFused && kReverse));
  using Shape = ForwardShape<kKeys, kValues, kFused>;
  using Panel = Shape::Panel;
  using Shared = Shape::Shared;
  static constexpr int kColumns = Shape::kColumns, kPanel = Shape::kPanel,
                       kKeyPanels = Shape::kKeyPanels, kValuePanels = Shape::kValuePanels,
                       kKeyTile = Shape::kKeyTile, kValueTile = Shape::kValueTile,
                       kStage = Shape::kStage, kStages = Shape::kStages,
                       kStateGroups = Shape::kStateGroups, kStatePanel = Shape::kStatePanel;

  struct Maps {
    const CUtensorMap &q, &k, &v, &o;
  };

  __device__ static void copy_tiles(const Maps& maps, const Launch& p, Shared& shared) {
    const int first_column = first_value<kValues>(p);
    Ring<kStages> ring;
    Walk walk(p);
    for (Segment s; walk.next(s);)
#pragma unroll 1
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        unsigned char* const stage = shared.stage[ring.stage];
        barrier_wait(&shared.barriers.empty[ring.stage], ring.parity ^ 1);
        const bool computed = chunk >= s.first;
        const int token = s.token + token_of<kReverse>(s, chunk);
        std::uint64_t* const full =
            shared.barriers.expect(ring.stage, computed ? kStage : kKeyTile + kValueTile,
                                   kFused || is_tail<kReverse>(p, s, chunk));
        unsigned char* to = stage;
        for (int panel = 0; panel < kKeyPanels; ++panel, to += kPanel) {
          if (computed) load_box(to, &maps.q, full, panel * kColumns, token, s.head, s.batch);
          load_box(to + kKeyTile, &maps.k, full, panel * kColumns, token, s.head, s.batch);
        }
        to += kKeyTile;
        for (int panel = 0; panel < kValuePanels; ++panel, to += kPanel)
          load_box(to, &maps.v, full, first_column + panel * kColumns, token, s.head, s.batch);
      }
  }

  // v, by three warps that the loading thread leaves idle.
  __device__ static void turn_all_values(const Launch& p, Shared& shared) {
    Ring<kStages> ring;
    Walk walk(p);
    for (Segment s; walk.next(s);)
#pragma unroll 1
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        const int length = p.first_chunk == nullptr ? kChunk : length_of<kReverse>(s, chunk);
        barrier_wait(&shared.barriers.loaded[ring.stage], ring.parity);
        turn_values<Panel, kValueTile>(shared.stage[ring.stage] + 2 * kKeyTile, p.silu_v, length);
        shared_writes_fence();
        __syncwarp();
        if (lane_of_warp() == 0) barrier_arrive(&shared.barriers.full[ring.stage]);
      }
  }

  __device__ static void make_output(const Maps& maps, const OutputRows& o, const Launch& p,
                                     Shared& shared) {
    const int lane = lane_of_warp(), first_column = first_value<kValues>(p);
    const std::uint64_t state = Panel::operand(shared_address(shared.state), kStatePanel);
    Ring<kStages> ring;
    std::uint32_t state_parity = 0;
    [[maybe_unused]] Queries<kKeys> queries;
    [[maybe_unused]] bool is_ahead = false;  // they are those of the chunk that comes
    Walk walk(p);
    for (Segment s; walk.next(s);) {
      [[maybe_unused]] float* const row_squares = row_squares_of(p, s);
      const float rate = -1.44269504f * s.slope;
      float decay[kChunk / 2];
      fill_decay<kReverse>(decay, p.scale, rate);
      float from_state[2];
      if constexpr (!kReverse) fill_from_state<false>(from_state, p.scale, rate, kChunk);
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        barrier_wait(&shared.barriers.full[ring.stage], ring.parity);
        if (chunk < s.first) {
          if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
          continue;
        }
        const std::uint32_t tile = shared_address(shared.stage[ring.stage]);
        const std::uint64_t q = Panel::operand(tile), k = Panel::operand(tile + kKeyTile),
                            v = Panel::operand(tile + 2 * kKeyTile, kPanel);
        float scores[kChunk / 2], sum[kValues / 2];
        if constexpr (kFused)
          if (!is_ahead) {
            load_queries<Panel>(queries, tile);
            if (p.silu_q) silu(queries);
          }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          const std::uint64_t at = Panel::by_k(i, kPanel);
          if constexpr (kFused)
            wgmma<0>(scores, queries[i], k + at, i > 0);
          else
            wgmma<0, 0>(scores, q + at, k + at, i > 0);
        }
        wgmma_commit();
        barrier_wait(&shared.barriers.state_full, state_parity);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i)
          if constexpr (kFused)
            wgmma<1>(sum, queries[i], state + Panel::across_k(i), i > 0);
          else
            wgmma<0, 1>(sum, q + Panel::by_k(i, kPanel), state + Panel::across_k(i), i > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the mask hides under Q S
        settle(scores);
        Scores weights;
        mask_scores(weights, scores, decay);
        wgmma_wait<0>();
        settle(sum);
        if (lane == 0) barrier_arrive(&shared.barriers.state_empty);
        state_parity ^= 1;
        if constexpr (kReverse)
          fill_from_state<true>(from_state, p.scale, rate, length_of<true>(s, chunk));
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i) sum[i] *= from_state[i % 4 / 2];
        settle(sum);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kChunk / 16; ++i)
          wgmma<1>(sum, weights[i], v + Panel::across_k(i), true);
        wgmma_commit();
        if constexpr (kFused) {  // under the product, where the next stage is there
          Ring<kStages> after = ring;
          after.next();
          is_ahead = chunk + 1 < s.last &&
                     barrier_passed(&shared.barriers.loaded[after.stage], after.parity);
          if (is_ahead) load_queries<Panel>(queries, shared_address(shared.stage[after.stage]));
        }
        wgmma_wait<0>();
        settle(sum);
        if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
        if constexpr (kFused) {
          if (is_ahead && p.silu_q) silu(queries);
          store_row_squares(sum, row_squares, token_of<kReverse>(s, chunk), s.tokens);
        }
        store_rows<Panel>(sum, shared.out[warp_of_group()], maps.o, o, first_column, p.V,
                          p.first_chunk != nullptr, token_of<kReverse>(s, chunk), s);
      }
    }
    if (lane == 0) store_wait_read();
  }

  // This warp's columns of k, turned in registers and in the stage.
  __device__ static void take_keys(Columns& keys, const Launch& p, Shared& shared,
                                   const Ring<kStages>& ring, int first_row, int length) {
    const std::uint32_t at =
        Columns::address<Panel>(shared_address(shared.stage[ring.stage]) + kKeyTile, first_row);
    barrier_wait(&shared.barriers.loaded[ring.stage], ring.parity);
    if (first_row + 16 * warp_of_group() < kKeys) {
      keys.load<Panel>(at);
      turn_keys<Panel>(keys, at, p.silu_k, length);
    } else {
      keys = {};  // rows of S that nobody asks for
    }
    __syncwarp();
    if (lane_of_warp() == 0) barrier_arrive(&shared.barriers.full[ring.stage]);
  }

  // Rows 64 group .. + 63 of S.
  __device__ static void carry_state(const Launch& p, Shared& shared, int group) {
    const int lane = lane_of_warp(), first_row = group * 64;
    const std::uint32_t copy =
        shared_address(shared.state) + (first_row + warp_of_group() * 16) * Panel::kRow;
    Ring<kStages> ring;
    std::uint32_t state_parity = 1;
    const auto show = [&](const float(&sum)[kValues / 2]) {
      barrier_wait(&shared.barriers.state_empty, state_parity);
      state_parity ^= 1;
      write_tile<Panel>(sum, copy, kStatePanel);
      shared_writes_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.barriers.state_full);
    };
    [[maybe_unused]] Columns keys;
    [[maybe_unused]] bool is_ready = false;  // the first chunk of the segment that comes
    const auto length = [&](const Segment& s, int chunk) {
      return kFused && p.first_chunk == nullptr ? kChunk : length_of<kReverse>(s, chunk);
    };
    Walk walk(p);
    Segment s;
    for (bool has_more = walk.next(s); has_more;) {
      float sum[kValues / 2];
      read_start(sum, s, first_row, p);
      Weights<kReverse> weights;
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        if constexpr (kFused)
          if (!is_ready) take_keys(keys, p, shared, ring, first_row, length(s, chunk));
        if (chunk >= s.first && !(kFused && is_ready)) show(sum);
        is_ready = false;
        weights.fit(length_of<kReverse>(s, chunk), s.slope, p.scale);
        barrier_wait(&shared.barriers.full[ring.stage], ring.parity);
        const std::uint32_t tile = shared_address(shared.stage[ring.stage]);
        const std::uint64_t v = Panel::operand(tile + 2 * kKeyTile, kPanel);
        if constexpr (kFused)
          add_chunk<Panel>(sum, weights, keys, v);
        else
          add_chunk<Panel>(sum, weights, tile + kKeyTile, first_row, v);
        __syncwarp();  // every lane has read
        if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
      }
      const Segment ended = s;
      if constexpr (kFused) {
        // O goes on with the next segment while this one's state is written.
        has_more = walk.next(s);
        is_ready = has_more && s.begin == s.first && start_of(p, s).data == nullptr;
        if (is_ready) {
          take_keys(keys, p, shared, ring, first_row, length(s, s.begin));
          const float zero[kValues / 2] = {};
          show(zero);
        }
      }
      write_end(sum, ended, first_row, p);
      if constexpr (!kFused) has_more = walk.next(s);
    }
  }

  __device__ static void run(const Maps& maps, const OutputRows& o, const Launch& p,
                             Shared& shared) {
    if (p.state_only) let_next_launch_start();
    if (threadIdx.x == 0)
      shared.barriers.init(kFused ? 3 + 4 * kStateGroups : 1, 4 * (1 + kStateGroups),
                           4 * kStateGroups, 4);
    __syncthreads();
    // Uniform for the compiler too, else it serialises the products.
    const int role = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (role == 0) {
      registers_down<Shape::kRegisters.copy>();
      if (threadIdx.x == 0) copy_tiles(maps, p, shared);
      if (kFused && threadIdx.x >= 32) turn_all_values(p, shared);
      if (!kFused && threadIdx.x / 32 == 1)
        clear_tails<kReverse, Panel>(p, shared.stage, shared.barriers);
    } else if (role == 1) {
      registers_up<Shape::kRegisters.output>();
      make_output(maps, o, p, shared);
    } else {
      if constexpr (Shape::kRegisters.state <= Shape::kRegisters.at_start)
        registers_down<Shape::kRegisters.state>();
      else
        registers_up<Shape::kRegisters.state>();
      carry_state(p, shared, role - 2);
    }
  }
};

template <int kKeys, int kValues, bool kFused, bool kReverse>
__global__ void __launch_bounds__(ForwardShape<kKeys, kValues, kFused>::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                   const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o,
                   const __grid_constant__ OutputRows o_rows, const __grid_constant__ Launch p) {
  using F = Forward<kKeys, kValues, kFused, kReverse>;
  extern __shared__ __align__(1024) unsigned char memory[];
  F::run({q, k, v, o}, o_rows, p, *reinterpret_cast<typename F::Shared*>(memory));
}

}  // namespace everlong::lightning::engine
