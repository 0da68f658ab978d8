// What the CPU kernel refuses.
#pragma once
#include <array>
#include <cstdint>
#include <span>

#include "core/status.h"
#include "core/tensor_view.h"
#include "mechanisms/lightning/params.h"

namespace everlong::lightning::cpu {

// What forward, backward and step have in common.
struct Problem {
  Shape shape;
  DType dtype = DType::kFloat32;
  std::array<std::int64_t, 4> keys, values, states;
};

// The dtype and the sizes that all views must have, from q, k, v and the first state.
Result<Problem> check_inputs(const ConstTensorView& q, const ConstTensorView& k,
                             const ConstTensorView& v, const ConstTensorView& state,
                             std::span<const std::int64_t> cu_seqlens,
                             std::span<const double> slope, double scale);

Status check_view(const char* name, const ConstTensorView& x, DType dtype,
                  const std::array<std::int64_t, 4>& sizes);
// Passes absent views.
Status check_optional(const char* name, const ConstTensorView& x, DType dtype,
                      const std::array<std::int64_t, 4>& sizes);

}  // namespace everlong::lightning::cpu
