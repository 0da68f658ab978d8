// Infini-attention on tensors: the plain form and the composite one. Legend: params.h.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

#include "mechanisms/infini/params.h"
#include "ops/operator.h"

namespace everlong::infini {

enum class Path {
  kAuto,       // kernels where they can run
  kComposite,  // ATen operations alone: any device and floating dtype
  kCpu,        // the CPU kernels: fp32 and bf16, dims up to 256; refused elsewhere
};

// The path that calls with these tensors take: "cpu" or "composite". Under the delta rule the write
// is ATen operations on either.
std::string_view path_taken(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                            const at::Tensor& v_BTGV, Path path = Path::kAuto);

// What sequences at one and the same position carry. Undefined M and z: nothing has been written.
// Undefined k, v and weight: no open tokens.
struct Carried {
  at::Tensor M_NGKV, z_NGK;              // committed memory: fp32, fp64 for fp64
  at::Tensor k_NFGK, v_NFGV, weight_NF;  // the F < C tokens of the open segment, not turned
  std::int64_t segment_number = 0;       // of the open segment; what bptt_segments counts

  std::int64_t open() const { return k_NFGK.defined() ? k_NFGK.size(1) : 0; }
};

struct Mixed {
  at::Tensor out_BTHV;  // the dtype of q
  Carried after;        // owns its storage; M and z stay undefined while nothing was ever written
};

// q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], none of them turned (no position embedding), one
// dtype and device. beta is [H], [1] (one gate a layer) or [H V] (one a channel); undefined: the
// memory alone is returned, zeros where it is empty. weight [B, T]: how often each token is
// written, 0 never (also what a NaN in it holds); undefined: once each; no gradient. Write per
// segment, scan over segments, then one read: no loop over segments but for the small product of
// the delta rule. Differentiable once in q, k, v, beta and what is carried.
Mixed infini_attention(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                       const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                       const Options& options, Path path = Path::kAuto);

// Tokens q [B, t, H, K] that stay within one segment whose rows k [B, u, G, K], v [B, u, G, V], u
// >= t, end with their own; M and z: the memory before it, undefined when nothing was ever written.
// What a decoding step is.
at::Tensor attend_open_segment(const at::Tensor& q_BTHK, const at::Tensor& k_BUGK,
                               const at::Tensor& v_BUGV, const at::Tensor& beta,
                               const at::Tensor& M_BGKV, const at::Tensor& z_BGK,
                               const Options& options, Path path = Path::kAuto);

// The definition, segment by segment, as the equations stand (M / den), in the dtype of the input.
Mixed naive(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
            const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
            const Options& options);

// g for every head, [H, 1] or [H, V] or [1, 1], from the trained numbers.
at::Tensor gate_of(const at::Tensor& beta, std::int64_t heads, const Options& options,
                   at::ScalarType dtype);
// max(x, 0) + exp(min(x, 0)): exact where elu(x) + 1 cancels.
at::Tensor sigma(const at::Tensor& x);

// Kind "infini_attention": inputs q, k, v, beta, write_weight (optional); output "o". Kind
// "infini_memory": inputs q, k, v, write_weight (optional); output "mem". Params as in the golden
// README and delta_z, bptt_segments. State: M [N,G,K,V], z [N,G,K], and (together or not at all) k
// [N,P,G,K], v [N,P,G,V], weight [N,P] of the open segment's tokens, rows behind them zero, and
// position int64 [N], tokens fed. M and z alone: one whole segment has passed.
const Operator& attention_operator();
const Operator& memory_operator();

// everlong::infini_attention in torch's dispatcher. Once a process: registry.cpp.
void register_schemas();

}  // namespace everlong::infini
