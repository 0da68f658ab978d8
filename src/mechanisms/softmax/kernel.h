// Causal attention on the CPU: the shared softmax block over sequences, heads and tiles of tokens.
//
// Nothing is allocated: the caller gives a workspace, 64-byte aligned, contents free. Work is cut
// by the shapes alone, and every sum has one order, so the bits do not depend on the number of
// threads.
#pragma once
#include <cstdint>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::softmax {

struct KernelCall {
  // q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; fp32 or bf16, one for all; the last dimension
  // contiguous. Without offsets token t sits at key S - T + t; with them B = 1, S = T and sequence
  // n owns [offsets[n], offsets[n + 1]).
  ConstTensorView q, k, v;
  std::span<const std::int64_t> offsets;
  std::int64_t window = 0;  // a token sees itself and the window - 1 before it; 0: all before it
  double scale = 1;
};

// What the kernel cannot do: other dtypes, dims above 256, shapes that do not fit.
Status check_kernel_call(const KernelCall& call);

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads);
std::int64_t backward_workspace_bytes(const KernelCall& call, int threads);

// o [B, T, H, V] in the dtype of q; lse fp32 [1, B, H, T], natural logarithm, -inf where a token
// sees no key.
Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor);

struct KernelGrads {
  ConstTensorView o, lse, grad_o;     // of the forward; grad_o with its last dimension contiguous
  TensorView grad_q, grad_k, grad_v;  // in the dtype of q, written in full
};
Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor);

}  // namespace everlong::softmax
