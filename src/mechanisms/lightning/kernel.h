// The CPU kernel of decayed linear attention: forward, backward and one step, by chunks that stay
// in the cache.
//
//   S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t        README.md sections 1 to 3
//
// Torch-free. SIMD is chosen at run time; memory and threads are the caller's. Results are the same
// bits for any number of threads. Legend: B batch, T tokens, H heads, K key dim, V value dim, N
// sequences.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::lightning::cpu {

inline constexpr std::int64_t kMaxDim = 256;  // of K and of V; any size up to it

// Views must outlive the call. q, k, v, o and their gradients are all fp32 or all bf16 (rounded to
// nearest; everything inside is fp32), states fp32; the last dimension of all is contiguous.
struct ForwardArgs {
  ConstTensorView q_BTHK, k_BTHK, v_BTHV;
  TensorView o_BTHV;
  ConstTensorView state_NHKV = {};  // absent: zero
  TensorView state_out_NHKV = {};   // absent: not wanted; may be the memory of state_NHKV
  std::span<const std::int64_t> cu_seqlens = {};  // N+1 offsets, B = 1; empty: N = B
  std::span<const double> slope = {};             // H values >= 0, nats per token
  double scale = 1.0;
};

// Gradients of <o, grad_o> + <final state, grad_state>. An absent output is not computed.
struct BackwardArgs {
  ConstTensorView q_BTHK, k_BTHK, v_BTHV;
  ConstTensorView state_NHKV = {};  // as in the forward pass
  ConstTensorView grad_o_BTHV = {};
  ConstTensorView grad_state_NHKV = {};  // absent: zero
  TensorView grad_q_BTHK = {}, grad_k_BTHK = {}, grad_v_BTHV = {};
  TensorView grad_state_in_NHKV = {};
  std::span<const std::int64_t> cu_seqlens = {};
  std::span<const double> slope = {};
  double scale = 1.0;
};

// Bytes that forward and backward need besides their arguments: O(threads (K V + C (K + V)) + H C)
// for chunks of C tokens, whatever T is. They may hold anything before and hold nothing after.
std::size_t workspace_bytes(std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim,
                            int threads);

// Refuse, before any work, what validate() of params.h refuses, other dtypes, dims above kMaxDim,
// views that do not fit each other and a workspace that is too small. Never allocate or throw.
// Thread safe for disjoint outputs.
Status forward(const ForwardArgs& args, std::span<std::byte> workspace, const Executor& executor);
Status backward(const BackwardArgs& args, std::span<std::byte> workspace, const Executor& executor);

// forward for T = 1 without offsets: one pass over the states, which is all that binds it.
Status step(const ForwardArgs& args, const Executor& executor);

}  // namespace everlong::lightning::cpu
