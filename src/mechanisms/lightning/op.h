// Decayed linear attention on tensors: the CPU kernel, and the composite form in ATen operations
// for any device and floating dtype.
//
//   S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t
//
// Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "mechanisms/lightning/op_decay.h"
#include "ops/operator.h"

namespace everlong::lightning {

enum class Path {
  kAuto,       // a kernel, CPU or CUDA, where one can run, otherwise the composite form
  kComposite,  // ATen operations: any device and floating dtype
  kCpu,        // the CPU kernel: fp32 and bf16, dims up to 256; refused elsewhere
};

// What layers do around the operator. Hopper's engine does it on the way; elsewhere it is ATen
// operations before and after, with the same meaning.
struct Fusion {
  bool silu_q = false, silu_k = false, silu_v = false;  // x / (1 + exp(-x)) in place of x
  bool row_squares = false;                             // wanted
  bool final_state = true;  // wanted; not defined otherwise, which may save writing it
  bool any() const { return silu_q || silu_k || silu_v || row_squares; }
};

struct Attention {
  at::Tensor o_BTHV;      // dtype of v
  at::Tensor state_NHKV;  // fp32, or fp64 for fp64 inputs; storage of its own
  // Sums of o^2 over V, in the dtype of the state: what a norm over all heads needs. Not defined
  // unless wanted.
  at::Tensor row_squares_BTH = {};
};

// q, k [B, T, H, K], v [B, T, H, V]: one floating dtype and device, free strides. cu_seqlens (on
// the host): N+1 offsets of sequences packed into B = 1, empty ones legal; empty: N = B. state [N,
// H, K, V], any floating dtype; none: zero. T = 0 and 1 are legal; one token costs one state
// update.
//
// Products accumulate in the state's dtype. Differentiable once in q, k, v and state; the backward
// pass keeps q, k, v (with silu, as they are before it) and the first state, the composite form one
// state a block. Throws
// c10::ValueError before any work when the arguments do not fit. Thread safe. On CUDA it waits for
// nothing; packed lines and the first use of a Decay copy small tables to the device.
Attention decay_linear_attention(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                                 const at::Tensor& v_BTHV, const Decay& decay,
                                 at::IntArrayRef cu_seqlens = {},
                                 const std::optional<at::Tensor>& state_NHKV = std::nullopt,
                                 Path path = Path::kAuto, const Fusion& fusion = {});

// By ATen operations: x or silu(x), the gradient of x from that of silu_where's result, and the row
// squares of o.
at::Tensor silu_where(bool wanted, const at::Tensor& x);
at::Tensor grad_before_silu(bool wanted, const at::Tensor& grad, const at::Tensor& x);
at::Tensor row_squares(const at::Tensor& o_BTHV);

// x, or an empty fp32 tensor beside `like`, which stands for none where autograd and schemas want
// one.
at::Tensor or_empty(const at::Tensor& x, const at::Tensor& like);

// The path that decay_linear_attention takes for several of these tokens: "cpu", "cuda" (Hopper's
// chunk engine), "cuda sweep" (sm_80 and later) or "composite". One token without gradients takes a
// CUDA kernel of its own.
std::string_view path_taken(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK,
                            const at::Tensor& v_BTHV, Path path = Path::kAuto);

// The plain quadratic form in the dtype of the inputs, masks and sums included: the yardstick of
// rounding. Autograd differentiates it. Same arguments.
Attention naive(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK, const at::Tensor& v_BTHV,
                const Decay& decay, at::IntArrayRef cu_seqlens = {},
                const std::optional<at::Tensor>& state_NHKV = std::nullopt);

// What both refuse, as a Status.
Status check_arguments(const at::Tensor& q_BTHK, const at::Tensor& k_BTHK, const at::Tensor& v_BTHV,
                       const Decay& decay, at::IntArrayRef cu_seqlens,
                       const std::optional<at::Tensor>& state_NHKV);

// "decay_linear_attention" and "slopes", as the laws, golden_check and the benchmark see them.
const Operator& attention_operator();
const Operator& slopes_operator();

// everlong::decay_linear_attention in torch's dispatcher. Once a process: registry.cpp.
void register_schemas();

}  // namespace everlong::lightning
