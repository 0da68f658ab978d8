// Timestep norm and complex moving average on the CPU in one pass over the activations: each tile
// of tokens is read once, normalised, averaged and written while it is in the cache.
//
// A task is a block of channels (whole norm groups) with all sequences in order, so every sum has
// one order and the bits do not depend on the number of threads. Channels lie in lanes, modes in
// registers; statistics are fp64, states and coefficients fp32. Nothing is allocated: the caller
// gives a workspace, 64-byte aligned, contents free.
#pragma once
#include <cstdint>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::megalodon {

// Tokens between two states that the backward pass starts from. 256: what is recomputed of one mode
// and 16 channels takes 32 KB, a first cache.
inline constexpr std::int64_t kSegment = 256;

struct NormEmaCall {
  ConstTensorView x;  // [1, B, T, D], fp32 or bf16, the last dimension contiguous
  std::span<const std::int64_t> offsets;  // packed (B = 1), or empty: N = B

  // The norm; groups = 0: none, the average runs over x.
  std::int64_t groups = 0;
  double eps = 0;
  const float *gain = nullptr, *bias = nullptr;  // [D]; gain = 1 + weight
  std::span<const std::int64_t> counts;          // N: tokens before
  const double *mean = nullptr, *var = nullptr;  // [N, G]

  // The average; modes = 0: none.
  std::int64_t modes = 0;
  const float* coefficients = nullptr;  // [5, M, D]: q (re, im), a, c (re, im)
  const float* omega = nullptr;         // [D]
  const float* h = nullptr;             // [N, D, M, 2], or null: zeros

  std::int64_t batch() const { return x.sizes[1]; }
  std::int64_t tokens() const { return x.sizes[2]; }
  std::int64_t width() const { return x.sizes[3]; }
  std::int64_t sequences() const {
    return offsets.empty() ? batch() : static_cast<std::int64_t>(offsets.size()) - 1;
  }
  std::int64_t length(std::int64_t n) const {
    return offsets.empty() ? tokens() : offsets[n + 1] - offsets[n];
  }
  // The first token of sequence n among all B T.
  std::int64_t first(std::int64_t n) const { return offsets.empty() ? n * tokens() : offsets[n]; }
  // All segments of all sequences.
  std::int64_t segments() const;
};

Status check_kernel_call(const NormEmaCall& call);

struct NormEmaResult {
  TensorView u, e;                         // [1, B, T, D] in the dtype of x; as the call has them
  double *mean = nullptr, *var = nullptr;  // [N, G]
  float* h = nullptr;                      // [N, D, M, 2]
  // What the backward pass needs; null: not wanted. Statistics after each token [B T, G], and the
  // state before each segment [segments, M, 2, D].
  double *means = nullptr, *scales = nullptr;  // scale = (var + eps)^(-1/2)
  float* checkpoints = nullptr;
};
std::int64_t forward_workspace_bytes(const NormEmaCall& call, int threads);
Status forward(const NormEmaCall& call, const NormEmaResult& result, std::span<std::byte> workspace,
               const Executor& executor);

struct NormEmaGrads {
  ConstTensorView grad_u, grad_e;                          // each may be absent
  const double *grad_mean = nullptr, *grad_var = nullptr;  // of the final state; null: zero
  const float* grad_h = nullptr;
  const double *means = nullptr, *scales = nullptr;  // of the forward
  const float* checkpoints = nullptr;
  // Written in full, where the call has them.
  TensorView grad_x;
  float *grad_gain = nullptr, *grad_bias = nullptr, *grad_coefficients = nullptr,
        *grad_omega = nullptr;
  double *grad_mean_in = nullptr, *grad_var_in = nullptr;  // [N, G]
  float* grad_h_in = nullptr;                              // [N, D, M, 2]
};
std::int64_t backward_workspace_bytes(const NormEmaCall& call, int threads);
Status backward(const NormEmaCall& call, const NormEmaGrads& grads, std::span<std::byte> workspace,
                const Executor& executor);

}  // namespace everlong::megalodon
