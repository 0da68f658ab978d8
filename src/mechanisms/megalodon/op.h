// The operators of a Megalodon layer on tensors: composite forms in plain ATen (any device and
// floating dtype, differentiable, no loop over tokens) and the CPU kernel. Legend: params.h.
//
// offsets: N + 1 numbers that divide a packed line (B = 1) into sequences; empty: N = B rows.
// Arguments that do not fit throw a torch error with the message of the Status.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>
#include <vector>

#include "mechanisms/megalodon/params.h"
#include "ops/operator.h"

namespace everlong::megalodon {

using Offsets = std::span<const std::int64_t>;

enum class Path {
  kAuto,       // the CPU kernel where it can run, otherwise the composite form
  kComposite,  // ATen operations
  kCpu,        // the CPU kernel: fp32 and bf16; refused elsewhere
};

// Statistics of the tokens so far. Always fp64: carried in less, the mean of a long text stops
// moving.
struct NormState {
  std::vector<std::int64_t> counts;  // tokens seen, N
  at::Tensor mean_NG, var_NG;        // fp64
};
NormState fresh_norm_state(std::int64_t sequences, std::int64_t groups, at::Device device);

struct Normalised {
  at::Tensor y_BTD;  // in the dtype of x
  NormState state;
};
// x [B, T, D], weight and bias [D] (the factor is 1 + weight), any fp dtype. Moments of a token in
// fp32 (fp64 for fp64), sums over time in fp64.
Normalised timestep_norm(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                         const at::Tensor& bias_D, double eps, Offsets offsets,
                         const NormState& state, Path path = Path::kAuto);

// Parameters of the moving average as published: alpha and delta [D, M, 1], theta [D, 1, 1], gamma
// [D, M, 2], omega [D, 1]. Coefficients are computed from them in fp64, whatever their dtype.
struct EmaWeights {
  at::Tensor alpha_DM1, delta_DM1, theta_D11, gamma_DM2, omega_D1;
  // ema_planes() of these weights, where a caller keeps it; undefined: computed in every call.
  at::Tensor planes_5MD = {};
  std::int64_t width() const { return alpha_DM1.size(0); }
  std::int64_t modes() const { return alpha_DM1.size(1); }
};
// What the CPU kernel reads, fp32: q (re, im), a, gamma / sqrt(M) (re, im). Differentiable.
at::Tensor ema_planes(const EmaWeights& weights);

struct Averaged {
  at::Tensor y_BTD;   // in the dtype of x
  at::Tensor h_NDM2;  // (re, im) after the last token; fp32, fp64 for fp64 inputs
};
// h undefined: zeros.
Averaged cema(const at::Tensor& x_BTD, const EmaWeights& weights, Offsets offsets,
              const at::Tensor& h_NDM2, Path path = Path::kAuto);

// The path that the norm and the average take for these tensors: "cpu" or "composite".
std::string_view path_taken(const at::Tensor& x_BTD, Path path = Path::kAuto);

// The two in one: u = timestep_norm(x), e = cema(u). On the CPU one pass over the activations.
struct NormAveraged {
  at::Tensor u_BTD, e_BTD;
  NormState norm;
  at::Tensor h_NDM2;
};
NormAveraged norm_cema(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                       const at::Tensor& bias_D, double eps, const EmaWeights& weights,
                       Offsets offsets, const NormState& norm, const at::Tensor& h_NDM2,
                       Path path = Path::kAuto);

struct AttentionShape {
  std::int64_t chunk = 1;
  double rope_base = kRopeBase, eps = kNormEps;
};
// Keys (already turned) and values of each sequence's unfinished chunk.
struct ChunkCache {
  std::vector<std::int64_t> counts;  // valid rows, N; each below the chunk size
  at::Tensor k_NPHK, v_NPHV;         // rows behind counts are never read
};
ChunkCache empty_cache(std::int64_t sequences, const at::Tensor& z_BTHK, const at::Tensor& v_BTHV);

struct Attended {
  at::Tensor o_BTHV;
  ChunkCache cache;  // P is the longest count; zeros behind shorter ones
};
// z [B, T, H, K] before its norm, v [B, T, H, V], gamma and beta [2, H K]. Softmax in fp32 (fp64
// for fp64). The position of a token in its chunk is its sequence's count and what follows.
Attended chunk_attention(const at::Tensor& z_BTHK, const at::Tensor& v_BTHV,
                         const at::Tensor& gamma_2C, const at::Tensor& beta_2C,
                         const AttentionShape& shape, Offsets offsets, const ChunkCache& cache,
                         Path path = Path::kAuto);

// Rows that a cache grows to for `rows` of them: doubling from 64, at most a chunk.
std::int64_t cache_capacity(std::int64_t rows, std::int64_t chunk);
// The same without a graph, for streaming: new rows are written behind those of `cache`, which
// moves on. Buffers that are `shared`, too short, or begin a new chunk are replaced, so rows that
// somebody may hold stay as they are.
at::Tensor chunk_attention_appending(const at::Tensor& z_BTHK, const at::Tensor& v_BTHV,
                                     const at::Tensor& gamma_2C, const at::Tensor& beta_2C,
                                     const AttentionShape& shape, Offsets offsets,
                                     ChunkCache& cache, bool shared);

// The plain forms against which rounding is measured: statistics by a triangle of ones, a loop over
// tokens, all scores at once. fp32 (fp64 for fp64) inside, one row a sequence.
Normalised naive_timestep_norm(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                               const at::Tensor& bias_D, double eps, const NormState& state);
Averaged naive_cema(const at::Tensor& x_BTD, const EmaWeights& weights, const at::Tensor& h_NDM2);
Attended naive_chunk_attention(const at::Tensor& z_BTHK, const at::Tensor& v_BTHV,
                               const at::Tensor& gamma_2C, const at::Tensor& beta_2C,
                               const AttentionShape& shape, const ChunkCache& cache);

// Kinds "timestep_norm", "cema", "chunk_attention", as golden files have them (docs/formats.md),
// and "norm_cema". Inputs x (or z and v) and the weights "w.<name>"; states count, mean, var | h |
// cache_k, cache_v, count. Optional token inputs of all of them: "padding_mask" [B, T] (1: the
// token is not there: output 0, no state moves) and "reset" [B, T] (1: a document starts here).
const Operator& timestep_norm_operator();
const Operator& cema_operator();
const Operator& chunk_attention_operator();
const Operator& norm_cema_operator();

// everlong::timestep_norm, cema and chunk_attention in torch's dispatcher. Once a process:
// registry.cpp.
void register_schemas();

}  // namespace everlong::megalodon
