// Causal attention on tensors: the plain form, the composite one, the CPU kernel's, and the
// library's on CUDA. Legend: params.h.
//
// Bottom-right aligned: with S >= T keys, token t sits at key S - T + t, so a cache of past keys in
// front of the new ones is all that streaming needs. S < T is legal; a token that sees no key gives
// 0.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <string_view>

#include "ops/operator.h"

namespace everlong::softmax {

enum class Path {
  kAuto,       // kCpu or kCuda where it can run, otherwise the composite form
  kComposite,  // ATen operations: any device and floating dtype
  kCpu,        // the CPU kernel: fp32 and bf16, dims up to 256; refused elsewhere
  kCuda,       // ATen's FlashAttention 2: bf16 and fp16 (op_cuda.h says which); refused elsewhere
};

struct Options {
  std::int64_t window = 0;  // a token sees itself and the window - 1 before it; 0: all before it
  std::optional<double> scale = {};  // default 1 / sqrt(K)
  Path path = Path::kAuto;
};

// The path that attention takes for these tensors: "cpu", "cuda flash" or "composite".
std::string_view path_taken(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                            const at::Tensor& v_BSGV, const Options& options);

// q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] -> [B, T, H, V] contiguous, H a multiple of G:
// query heads in a row share a key/value head. One dtype and device for all; any strides. Low
// precision is multiplied with fp32 accumulation and its softmax is fp32. Memory O(T + S): the
// backward recomputes the probabilities. Same input, same bits. Does not wait for the device.
// Differentiable once in q, k and v.
at::Tensor attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                     const Options& options);

// The same for packed sequences without a past: B = 1, sequence n owns tokens [offsets[n],
// offsets[n + 1]).
at::Tensor attention_packed(const at::Tensor& q_1THK, const at::Tensor& k_1TGK,
                            const at::Tensor& v_1TGV, std::span<const std::int64_t> offsets,
                            const Options& options);

// The definition: every score at once, in the dtype of the input. O(T S) memory.
at::Tensor naive(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                 const Options& options);

// Kind "causal_attention". Inputs q, k, v [B, T, ..]; params scale (default 1 / sqrt(K)) and window
// (0: none); output "o". State: padded caches "k" [N, P, G, K] and "v" [N, P, G, V], and "length"
// int64 [N]: sequence n owns rows [0, length[n]); what lies behind them is never read (the final
// state has zeros there). With a window the final state keeps the last window - 1 rows.
// Forms: reference, reference_recurrent, reference_online (float64, by hand), naive, composite, cpu
// (fp32 and bf16), auto (what layers run on a GPU).
const Operator& attention_operator();

// everlong::causal_attention in torch's dispatcher. Once a process: registry.cpp.
void register_schemas();

}  // namespace everlong::softmax
