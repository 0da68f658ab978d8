// Dilated attention on the CPU: the shared softmax block over (batch, head, pattern, segment).
//
// Nothing is allocated: the caller gives a workspace, 64-byte aligned, contents free. Patterns come
// one after the other, each going on from the softmax that those before it left, so every sum has
// one order and the bits do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"
#include "mechanisms/longnet/params_lattice.h"

namespace everlong::longnet {

// One run of segments of one pattern for one class of heads.
struct KernelPiece {
  std::size_t pattern = 0;
  std::int64_t segment = 1, ratio = 1;
  HeadClass heads;
  LatticeRun run;
};

struct KernelCall {
  // q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]; fp32 or bf16, one for all, past included; the
  // last dimension contiguous.
  ConstTensorView q, k, v;
  std::span<const KernelPiece> pieces;              // ordered by pattern
  std::span<const ConstTensorView> past_k, past_v;  // a pattern each, [B, G, C, ..]; or empty
  bool causal = true;
  double scale = 1;
};

// What the kernel cannot do: other dtypes, dims above 256.
Status check_kernel_call(const KernelCall& call);

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads);
std::int64_t backward_workspace_bytes(const KernelCall& call, int threads);

// o fp32 [B, T, H, V] and lse fp32 [B, T, H, 1] (natural logarithm) hold what the first pattern
// goes on from: 0 and -inf.
Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor);

struct KernelGrads {
  ConstTensorView o, lse, grad_o;  // of the forward; o and grad_o fp32 or bf16
  // fp32, added to. grad_past: as past_k and past_v.
  TensorView grad_q, grad_k, grad_v;
  std::span<const TensorView> grad_past_k, grad_past_v;
};
// Of the joint softmax.
Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor);

}  // namespace everlong::longnet
