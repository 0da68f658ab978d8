// Tensors as kernels see them: a pointer, sizes and strides. Views own nothing.
#pragma once
#include <array>
#include <cstdint>

#include "core/dtype.h"

namespace everlong {

// Up to four dimensions, slowest first; unused ones have size 1 at the front. Activations are
// [B, T, H, D], recurrent states [N, H, Dk, Dv], both with the last dimension contiguous and every
// other stride free (also zero or negative). Strides count elements. data may be null: the tensor
// is absent.
template <class Void>
struct BasicTensorView {
  Void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::array<std::int64_t, 4> sizes{};
  std::array<std::int64_t, 4> strides{};

  explicit operator bool() const { return data != nullptr; }
  operator BasicTensorView<const void>() const { return {data, dtype, sizes, strides}; }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

}  // namespace everlong
