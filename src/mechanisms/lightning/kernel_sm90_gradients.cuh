// dK, dV and the state's gradient on Hopper, against time (README section 3). With R = dL/dS after
// a chunk of m tokens:
//   dV = ((K Q^T) .* D^T) dO + diag(a) K R,    dK = ((V dO^T) .* D^T) Q + diag(a) V R^T
//   R' = lambda^m R + (diag(w) Q)^T dO,        a_j = lambda^(m-1-j), w_i = scale lambda^(i+1)
// (D as in kernel_sm90_engine.cuh.) Both come from one pass: they share R and all four tiles.
// Warpgroups: one thread of the first copies tiles in, the second makes dV, the third dK, the
// fourth holds R; one bf16 copy of it serves both products, read by rows and by columns.
// Bound by memory: 1536 bytes a token and head at K = V = 128.
#pragma once
#include "mechanisms/lightning/kernel_sm90_parts.cuh"

namespace everlong::lightning::engine {

template <int kKeys, int kValues>
struct Gradients {
  static_assert(kKeys % 32 == 0 && kValues % 32 == 0);
  static constexpr int kColumns = panel_columns(kKeys, kValues);  // of a panel
  using Panel = hopper::Panel<kColumns>;
  static constexpr int kPanel = kChunk * Panel::kRow, kOutPanel = kOutRows * Panel::kRow;
  static constexpr int kKeyPanels = Panel::of(kKeys), kValuePanels = Panel::of(kValues);
  static constexpr int kThreads = 4 * kWarpgroup;
  static constexpr int kKeyTile = kPanel * kKeyPanels, kValueTile = kPanel * kValuePanels;
  // q, k, v, dO
  static constexpr int kK = kKeyTile, kV = 2 * kKeyTile, kGradO = kV + kValueTile,
                       kStage = kGradO + kValueTile;
  static constexpr int kStages = kStage > 48 * 1024 ? 2 : kStage > 32 * 1024 ? 3 : 4;
  static constexpr int kStatePanel = groups_of(kKeys) * 64 * Panel::kRow;

  struct Shared {
    alignas(1024) unsigned char stage[kStages][kStage];
    unsigned char state[kValuePanels * kStatePanel];
    unsigned char grad_v[4][kValuePanels * kOutPanel];
    unsigned char grad_k[4][kKeyPanels * kOutPanel];
    Barriers<kStages> barriers;
  };

  struct Maps {
    const CUtensorMap &q, &k, &v, &grad_o, &grad_k, &grad_v;
  };

  __device__ static void copy_tiles(const Maps& maps, const Launch& p, Shared& shared) {
    Ring<kStages> ring;
    Walk walk(p);
    for (Segment s; walk.next(s);)
#pragma unroll 1
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        unsigned char* const stage = shared.stage[ring.stage];
        barrier_wait(&shared.barriers.empty[ring.stage], ring.parity ^ 1);
        const bool computed = chunk >= s.first;
        const int token = s.token + token_of<true>(s, chunk);
        std::uint64_t* const full = shared.barriers.expect(
            ring.stage, computed ? kStage : kKeyTile + kValueTile, is_tail<true>(p, s, chunk));
        const auto tile = [&](int at, const CUtensorMap& map, int panels) {
          for (int panel = 0; panel < panels; ++panel)
            load_box(stage + at + panel * kPanel, &map, full, panel * kColumns, token, s.head,
                     s.batch);
        };
        tile(0, maps.q, kKeyPanels);
        tile(kGradO, maps.grad_o, kValuePanels);
        if (!computed) continue;
        tile(kK, maps.k, kKeyPanels);
        tile(kV, maps.v, kValuePanels);
      }
  }

  // sum = ((X Y^T) .* D^T) Z + diag(a) X R for dV (X = K, Y = Q, Z = dO), with R^T for dK (X = V,
  // Y = dO, Z = Q).
  template <bool kIsKeyGradient>
  __device__ static void make_gradient(const CUtensorMap& out, const OutputRows& rows,
                                       unsigned char* staged, const Launch& p, Shared& shared) {
    constexpr int kIn = kIsKeyGradient ? kValues : kKeys, kOut = kIsKeyGradient ? kKeys : kValues;
    constexpr int kX = kIsKeyGradient ? kV : kK, kY = kIsKeyGradient ? kGradO : 0,
                  kZ = kIsKeyGradient ? 0 : kGradO;
    const int lane = lane_of_warp();
    const std::uint64_t state = Panel::operand(shared_address(shared.state), kStatePanel);
    Ring<kStages> ring;
    std::uint32_t state_parity = 0;
    Walk walk(p);
    for (Segment s; walk.next(s);) {
      const float rate = -1.44269504f * s.slope;
      float decay[kChunk / 2];
      fill_decay<true>(decay, p.scale, rate);
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        barrier_wait(&shared.barriers.full[ring.stage], ring.parity);
        if (chunk < s.first) {
          if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
          continue;
        }
        const std::uint32_t tile = shared_address(shared.stage[ring.stage]);
        const std::uint64_t x = Panel::operand(tile + kX), y = Panel::operand(tile + kY),
                            z = Panel::operand(tile + kZ, kPanel);
        float scores[kChunk / 2], sum[kOut / 2];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kIn / 16; ++i) {
          const std::uint64_t at = Panel::by_k(i, kPanel);
          wgmma<0, 0>(scores, x + at, y + at, i > 0);
        }
        wgmma_commit();
        barrier_wait(&shared.barriers.state_full, state_parity);
#pragma unroll
        for (int i = 0; i < kIn / 16; ++i) {
          const std::uint64_t at = Panel::by_k(i, kPanel);
          if constexpr (kIsKeyGradient)
            wgmma<0, 0>(sum, x + at, state + Panel::by_k(i, kStatePanel), i > 0);
          else
            wgmma<0, 1>(sum, x + at, state + Panel::across_k(i), i > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        settle(scores);
        Scores weights;
        mask_scores(weights, scores, decay);
        wgmma_wait<0>();
        settle(sum);
        if (lane == 0) barrier_arrive(&shared.barriers.state_empty);
        state_parity ^= 1;
        float from_state[2];
        fill_from_state<true>(from_state, p.scale, rate, length_of<true>(s, chunk));
#pragma unroll
        for (int i = 0; i < kOut / 2; ++i) sum[i] *= from_state[i % 4 / 2];
        settle(sum);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kChunk / 16; ++i)
          wgmma<1>(sum, weights[i], z + Panel::across_k(i), true);
        wgmma_commit();
        wgmma_wait<0>();
        settle(sum);
        if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
        store_rows<Panel>(sum, staged, out, rows, 0, kIsKeyGradient ? p.K : p.V,
                          p.first_chunk != nullptr, token_of<true>(s, chunk), s);
      }
    }
    if (lane == 0) store_wait_read();
  }

  __device__ static void carry_state(const Launch& p, Shared& shared) {
    constexpr bool kTwo = kKeys > 64;
    const int lane = lane_of_warp();
    const std::uint32_t copy = shared_address(shared.state) + warp_of_group() * 16 * Panel::kRow;
    Ring<kStages> ring;
    std::uint32_t state_parity = 1;
    Walk walk(p);
    for (Segment s; walk.next(s);) {
      float low[kValues / 2], high[kValues / 2];  // rows 0 to 63 of R, and 64 to 127
      read_start(low, s, 0, p);
      if constexpr (kTwo) read_start(high, s, 64, p);
      Weights<true> weights;
      for (int chunk = s.begin; chunk < s.last; ++chunk, ring.next()) {
        if (chunk >= s.first) {
          barrier_wait(&shared.barriers.state_empty, state_parity);
          state_parity ^= 1;
          write_tile<Panel>(low, copy, kStatePanel);
          if constexpr (kTwo) write_tile<Panel>(high, copy + 64 * Panel::kRow, kStatePanel);
          shared_writes_fence();
          __syncwarp();
          if (lane == 0) barrier_arrive(&shared.barriers.state_full);
        }
        weights.fit(length_of<true>(s, chunk), s.slope, p.scale);
        barrier_wait(&shared.barriers.full[ring.stage], ring.parity);
        const std::uint32_t tile = shared_address(shared.stage[ring.stage]);
        const std::uint64_t grad_o = Panel::operand(tile + kGradO, kPanel);
        add_chunk<Panel>(low, weights, tile, 0, grad_o);
        if constexpr (kTwo) add_chunk<Panel>(high, weights, tile, 64, grad_o);
        __syncwarp();  // every lane has read
        if (lane == 0) barrier_arrive(&shared.barriers.empty[ring.stage]);
      }
      write_end(low, s, 0, p);
      if constexpr (kTwo) write_end(high, s, 64, p);
    }
  }

  __device__ static void run(const Maps& maps, const OutputRows& grad_k, const OutputRows& grad_v,
                             const Launch& p, Shared& shared) {
    if (p.state_only) let_next_launch_start();
    if (threadIdx.x == 0) shared.barriers.init(1, 12, 4, 8);
    __syncthreads();
    const int role = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (role == 0) {
      registers_down<24>();
      if (threadIdx.x == 0) copy_tiles(maps, p, shared);
      if (threadIdx.x / 32 == 1) clear_tails<true, Panel>(p, shared.stage, shared.barriers);
    } else if (role == 1) {
      registers_up<152>();
      make_gradient<false>(maps.grad_v, grad_v, shared.grad_v[warp_of_group()], p, shared);
    } else if (role == 2) {
      registers_up<152>();
      make_gradient<true>(maps.grad_k, grad_k, shared.grad_k[warp_of_group()], p, shared);
    } else {
      registers_up<176>();
      carry_state(p, shared);
    }
  }
};

template <int kKeys, int kValues>
__global__ void __launch_bounds__(4 * kWarpgroup, 1)
    gradients_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v,
                     const __grid_constant__ CUtensorMap grad_o,
                     const __grid_constant__ CUtensorMap grad_k,
                     const __grid_constant__ CUtensorMap grad_v,
                     const __grid_constant__ OutputRows grad_k_rows,
                     const __grid_constant__ OutputRows grad_v_rows,
                     const __grid_constant__ Launch p) {
  using G = Gradients<kKeys, kValues>;
  extern __shared__ __align__(1024) unsigned char memory[];
  G::run({q, k, v, grad_o, grad_k, grad_v}, grad_k_rows, grad_v_rows, p,
         *reinterpret_cast<typename G::Shared*>(memory));
}

}  // namespace everlong::lightning::engine
