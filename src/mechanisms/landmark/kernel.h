// Attention with landmarks on the CPU: the shared softmax block over sections, one after the other,
// and their gates. README.md, section 2.
//
// Nothing is allocated: the caller gives a workspace, 64-byte aligned, contents free. Every sum has
// one order, so the bits do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

struct KernelCall {
  // q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; fp32 or bf16, one for all; the last dimension
  // contiguous. Token t sits at key S - T + t.
  ConstTensorView q, k, v;
  // Sections of all rows of the batch, one row after the other; row b has [first_section[b],
  // first_section[b + 1]), which cover its S keys.
  std::span<const Section> sections;
  std::span<const std::int64_t> first_section;
  double scale = 1;
  bool drop_empty = false;
};

// What the kernel cannot do: other dtypes, dims above 256, rows that are not contiguous.
Status check_kernel_call(const KernelCall& call);

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads);
std::int64_t backward_workspace_bytes(const KernelCall& call, int threads);

// o [B, T, H, V] in the dtype of q; lse fp32 [1, B, H, T], natural logarithm, -inf where a token
// sees nothing.
Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor);

struct KernelGrads {
  ConstTensorView o, lse, grad_o;     // of the forward; grad_o with its last dimension contiguous
  ConstTensorView grad_lse;           // fp32 as lse, or absent
  TensorView grad_q, grad_k, grad_v;  // in the dtype of q, written in full
};
Status backward(const KernelCall& call, const KernelGrads& grads, std::span<std::byte> workspace,
                const Executor& executor);

}  // namespace everlong::landmark
