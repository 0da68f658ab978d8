// The composite forms on rows of one length, and how packed lines become rows: between the op_*.cpp
// files of this room.
#pragma once
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {

// fp64 for fp64, else fp32.
at::ScalarType working_dtype(const at::Tensor& x);

Normalised composite_timestep_norm(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                                   const at::Tensor& bias_D, double eps, const NormState& state);
Averaged composite_cema(const at::Tensor& x_BTD, const EmaWeights& weights,
                        const at::Tensor& h_BDM2);
// q [R, m, H, K] are the last of k [R, S, H, K]; a query sees the keys up to its own.
using Attend = at::Tensor (*)(const at::Tensor& q_RmHK, const at::Tensor& k_RSHK,
                              const at::Tensor& v_RSHV);
at::Tensor attend_composite(const at::Tensor& q_RmHK, const at::Tensor& k_RSHK,
                            const at::Tensor& v_RSHV);

// A past of its own for each row.
Attended composite_chunk_attention(const at::Tensor& z_BTHK, const at::Tensor& v_BTHV,
                                   const at::Tensor& gamma_2C, const at::Tensor& beta_2C,
                                   const AttentionShape& shape, const ChunkCache& cache,
                                   Attend attend);

// Rows of one length that write their keys and values into the buffers of `cache` [B, P, ..].
at::Tensor append_and_attend(const at::Tensor& z_BTHK, const at::Tensor& v_BTHV,
                             const at::Tensor& gamma_2C, const at::Tensor& beta_2C,
                             const AttentionShape& shape, const ChunkCache& cache, Attend attend);

// q and k [B, T, H, K] in the dtype of z: normalised, scaled, and turned by the positions inside
// the chunk that begin at `starts` (one a row).
struct QueriesAndKeys {
  at::Tensor q_BTHK, k_BTHK;
};
QueriesAndKeys queries_and_keys(const at::Tensor& z_BTHK, const at::Tensor& gamma_2C,
                                const at::Tensor& beta_2C, const AttentionShape& shape,
                                std::span<const std::int64_t> starts);

// One state of `all` as rows [first, first + count).
NormState rows_of(const NormState& state, std::int64_t first, std::int64_t count);
ChunkCache rows_of(const ChunkCache& cache, std::int64_t first, std::int64_t count);
NormState joined(const std::vector<NormState>& states);
ChunkCache joined(const std::vector<ChunkCache>& caches);

// Calls f(row of x, n) for each sequence of a packed line x [1, T, ..] and gives what it returned.
template <class F>
void for_each_sequence(Offsets offsets, F&& f) {
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n)
    f(static_cast<std::int64_t>(n), offsets[n], offsets[n + 1] - offsets[n]);
}

}  // namespace everlong::megalodon
