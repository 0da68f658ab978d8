// Attention with landmarks on tensors: the plain form, the composite one, and the CPU kernel's.
// Legend: params.h.
//
// Bottom-right aligned: with S >= T keys, token t sits at key S - T + t, so a cache of past keys in
// front of the new ones is all that streaming needs. A token that sees no key gives 0.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <string_view>

#include "ops/operator.h"

namespace everlong::landmark {

enum class Path {
  kAuto,       // the CPU kernel where it can run, otherwise the composite form
  kComposite,  // ATen operations: any device and floating dtype
  kCpu,        // the CPU kernel: fp32 and bf16, dims up to 256; refused elsewhere
};

struct Options {
  std::optional<double> scale;  // default 1 / sqrt(K)
  bool drop_empty = false;      // Params::drop_empty
  Path path = Path::kAuto;
};

struct Attended {
  at::Tensor out;  // [B, T, H, V], the dtype of q
  at::Tensor lse;  // [B, H, T], fp64 for fp64, else fp32: log of the sum over own tokens and gates
};

// q [B, T, H, K], k [B, S, G, K], v [B, S, G, V], H a multiple of G: query heads in a row share a
// key/value head. marks [B, S], bool or uint8 on the CPU: which keys are landmarks, each row its
// own. One dtype and device for q, k, v; any strides. Low precision is multiplied with fp32
// accumulation, its softmax is fp32. Memory O(T + S), the backward recomputes the weights. Same
// input, same bits. Differentiable once in q, k and v, through both results.
Attended attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                   const at::Tensor& marks_BS, const Options& options);

// The path that attention takes for these tensors: "cpu" or "composite".
std::string_view path_taken(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                            const at::Tensor& v_BSGV, const Options& options);

// The definition: every score at once, in the dtype of the input. O(T S) memory.
at::Tensor naive(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                 const at::Tensor& marks_BS, const Options& options);

// Weights [B, H, T, S] of scores [B, H, T, S] whose first query sits in column `prefix`.
at::Tensor grouped_softmax(const at::Tensor& scores_BHTS, const at::Tensor& marks_BS,
                           std::int64_t prefix, bool drop_empty);

// Kind "landmark_attention". Inputs q, k, v [B, T, ..] and is_landmark [B, T] (bool or uint8), or
// instead of the last the params block and phase: a landmark where (position + phase) mod block =
// block - 1. Params scale (default 1 / sqrt(K)), empty_block ("keep", "drop"), and as golden files
// state them: causal (true), rope ("none"), heads, heads_kv, seed. Output "o". State: padded caches
// "k" [N, P, G, K], "v" [N, P, G, V], "is_landmark" uint8 [N, P], and "length" int64 [N]: sequence
// n owns rows [0, length[n]); what lies behind them is never read (the final state has zeros).
// Forms: reference, reference_two_level (float64, by hand), naive, composite, cpu (fp32 and bf16).
const Operator& attention_operator();

// Kind "grouped_softmax". Inputs scores [B, H, T, S] and is_landmark [B, S]; mask, is_mem and
// last_section, which published code takes, follow from those and are not read. Params prefix,
// empty_block, variant and seed. Output "probs". Forms: reference, composite.
const Operator& grouped_softmax_operator();

// Kind "landmark_retrieval". Inputs q, k, v [B, T, ..], not turned; a landmark at every position
// block - 1 mod block, which is_landmark [B, T] (optional) must say too. Params block, top_k,
// chunks, granularity, max_blocks (null: all), window, mode ("chunk", "window"), positions
// ("slots"), rope ("half_split", "interleaved"), rope_base, scale, seed. Outputs "o" and "selected"
// [B, T, H, top_k]: absolute block numbers, rising, -1 where there are fewer.
// Forms: reference (no gradients), composite, cpu (fp32 and bf16; picks by kernel_search.h).
const Operator& retrieval_operator();

// everlong::landmark_attention in torch's dispatcher. Once a process: registry.cpp.
void register_schemas();

}  // namespace everlong::landmark
