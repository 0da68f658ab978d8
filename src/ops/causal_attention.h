// Causal softmax attention for rooms that have it inside (local attention of segments). Room
// softmax computes it: declared here because rooms do not include rooms.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

// q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] -> [B, T, H, V], bottom-right aligned: token t
// sees the keys up to S - T + t. H a multiple of G. kernels: the CPU kernel, or on CUDA ATen's
// fused attention, where they can run; else, and everywhere without it, ATen's plain operations.
// Differentiable once in q, k and v. Same input, same bits.
at::Tensor causal_attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                            const at::Tensor& v_BSGV, double scale, bool kernels);

}  // namespace everlong
