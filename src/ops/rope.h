// Rotary position embedding on tensors. Angles and sources: kernels/rope.h.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>

#include "kernels/rope.h"

namespace everlong {

struct RopeTable {
  at::Tensor cos, sin;  // [T, F] or [B, T, F]: F pairs, the first 2F coordinates of a head turn
  RopePairs pairs = RopePairs::kHalfSplit;
};

// One row a position: `positions` holds T of them, or B * T row-major with `batch` = B. fp64 for
// fp64, else fp32.
RopeTable make_rope_table(std::span<const std::int64_t> positions, std::int64_t batch,
                          std::span<const double> frequencies, RopePairs pairs,
                          at::ScalarType dtype, at::Device device);

// x [.., T, H, D] -> the same shape and dtype, coordinates from 2F on unchanged. Low precision
// turns in fp32 and is rounded once. Differentiable once in x (the gradient turns back).
at::Tensor apply_rope(const at::Tensor& x_BTHD, const RopeTable& table);

}  // namespace everlong
