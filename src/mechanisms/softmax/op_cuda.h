// Attention on CUDA by FlashAttention 2 (2307.08691) as ATen has it: the kernels are the library's,
// what is here gives them calls that they take and gradients that repeat. op.h chooses it.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>
#include <string>

#include "core/status.h"

namespace everlong::softmax {

// Why calls with such heads do not run there; empty: they do.
std::string why_not_flash(at::Device device, at::ScalarType dtype, std::int64_t key_dim,
                          std::int64_t value_dim);

// Whether it can run these: what why_not_flash says, tokens that each see a key (S >= T), and sizes
// within the kernels' 32-bit counters.
Status check_flash(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGK,
                   std::span<const std::int64_t> offsets);

// Tensors as in op.h, of shapes that fit and that check_flash passes. No offsets: each row is a
// sequence. Memory beside the result: forward fp32 O(T H); backward dq in fp32, as many times as it
// takes to give every multiprocessor a (sequence, head) of its own, and dk, dv for every query
// head.
at::Tensor attention_by_flash(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                              const at::Tensor& v_BSGK, std::span<const std::int64_t> offsets,
                              std::int64_t window, double scale);

}  // namespace everlong::softmax
