// Dilated attention on tensors: the plain form, the composite one, and the CPU kernel's. Legend:
// params.h.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "mechanisms/longnet/params.h"
#include "ops/operator.h"

namespace everlong::longnet {

enum class Path {
  kAuto,       // the CPU kernel where it can run, otherwise the composite form
  kComposite,  // ATen operations: any device and floating dtype
  kCpu,        // the CPU kernel: fp32 and bf16; refused elsewhere
};

struct Options {
  Geometry geometry;
  std::optional<double> scale;  // default 1 / sqrt(K)
  // XPos (2212.10554): channel pair j of a score fades as zeta_j^((p_query - p_key) / base). Taken
  // relative to the query's block, so that no power overflows. 0: none.
  double xpos_base = 0;
  Path path = Path::kAuto;
};

// What sequences that stand at one position carry: per pattern the lattice rows of the segment in
// progress, k [B, G, C_i, K] and v [B, G, C_i, V], C_i at most the pattern's rows(). Row l of a
// head is the position segment start + offset + l ratio; rows beyond rows_held are never read.
struct Past {
  std::int64_t position = 0;
  std::vector<at::Tensor> k, v;  // empty, or one a pattern
};

// q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] -> [B, T, H, V] contiguous, behind `past`. One
// dtype and device for all; any strides. A row that no pattern covers gives 0. Low precision is
// multiplied with fp32 accumulation, softmax and merge are fp32. Memory O(T). Same input, same
// bits. Differentiable once in q, k, v and the past.
at::Tensor attention(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                     const Options& options, const Past& past = {});

// The same for packed sequences without a past: B = 1, sequence n owns tokens [offsets[n],
// offsets[n + 1]); each has segments of its own.
at::Tensor attention_packed(const at::Tensor& q_1THK, const at::Tensor& k_1TGK,
                            const at::Tensor& v_1TGV, std::span<const std::int64_t> offsets,
                            const Options& options);

// What is carried after these tokens, buffers of `capacity[i]` rows (as many as are held, at
// least); rows beyond those held are 0. Differentiable.
Past advanced(const Past& past, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
              const Geometry& geometry, std::span<const std::int64_t> capacity);

// "cpu" or "composite": what attention takes for these tensors.
std::string_view path_taken(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                            const at::Tensor& v_BTGV, const Options& options);

// The definition: every score at once, in the dtype of the input. O(T^2) memory. Joint: one softmax
// over the keys of all patterns, a key that several see standing there as often.
at::Tensor naive(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                 const Options& options, const Past& past = {});

// Kind "dilated_attention". Inputs q, k, v; output "o". Params segment_length, dilated_ratio
// (lists), offset_rule, causal, pad, mixing_grad, beyond, scale. State (causal): "k<i>", "v<i>"
// [N, G, rows, ..] of pattern i and "position" int64 [N].
const Operator& attention_operator();
// Kind "dilated_decode": the first `prefill` tokens at once, then one at a time; output "o" of the
// latter. Params `state_rows` [patterns][G], when given, are checked against what is held.
const Operator& decode_operator();

// everlong::dilated_attention in torch's dispatcher. Once a process: registry.cpp.
void register_schemas();

}  // namespace everlong::longnet
