// Comparing tensors in tests: one measure of error, and messages that say where.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <string>

#include "core/text.h"
#include "ops/operator.h"
#include "support/tolerance.h"

// The ledger by torch's names of the types.
namespace everlong::tolerance {

constexpr DType of(c10::ScalarType dtype) {
  return dtype == c10::kDouble  ? DType::kFloat64
         : dtype == c10::kFloat ? DType::kFloat32
                                : DType::kBFloat16;
}
constexpr double floor_of(c10::ScalarType dtype) { return floor_of(of(dtype)); }
constexpr double split_of(c10::ScalarType dtype) { return split_of(of(dtype)); }

}  // namespace everlong::tolerance

namespace everlong::test {

// max |a - b| / max(max |b|, 1), in float64 on the CPU. Infinite when shapes differ or anything is
// not finite. The 1: inputs and incoming gradients of tests are of size 1, and a result that
// cancels to nothing (the gradient of q where a window of one key leaves no choice) is still made
// of terms of that size.
inline double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.defined() || !expected.defined() || actual.sizes() != expected.sizes())
    return std::numeric_limits<double>::infinity();
  if (expected.numel() == 0) return 0;
  const auto a = actual.detach().to(at::kCPU, at::kDouble),
             b = expected.detach().to(at::kCPU, at::kDouble);
  if (!at::isfinite(a).all().item<bool>() || !at::isfinite(b).all().item<bool>())
    return std::numeric_limits<double>::infinity();
  const double scale = std::max(b.abs().max().item<double>(), 1.0);
  return (a - b).abs().max().item<double>() / scale;
}

// Bit for bit, NaN payloads included.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined() || a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type())
    return false;
  const auto bytes = [](const at::Tensor& t) {
    return t.detach().cpu().contiguous().view(-1).view(at::kByte);
  };
  return a.numel() == 0 || at::equal(bytes(a), bytes(b));
}

inline std::string describe(const at::Tensor& t) {
  return t.defined() ? cat(t.scalar_type(), " ", t.sizes()) : "undefined";
}

inline TensorMap to(const TensorMap& tensors, at::Device device, at::ScalarType dtype) {
  TensorMap out;
  for (const auto& [name, t] : tensors)
    out[name] = t.is_floating_point() ? t.to(device, dtype) : t.to(device);
  return out;
}

}  // namespace everlong::test
