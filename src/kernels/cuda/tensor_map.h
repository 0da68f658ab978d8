// Descriptions of tensors for Hopper's tile copies. Only in builds with CUDA.
#pragma once
#include <cuda.h>

#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::cuda {

// Boxes of `rows` tokens x `columns` (64 or 32) of one head of x [B, T, H, D], bf16 in the swizzled
// panels of hopper.cuh. Coordinates are (column, token, head, batch), 64-bit underneath: no size
// overflows. Refuses strides that the copy engine cannot take: the base and every stride must be
// multiples of 16 bytes, the last dimension contiguous. Thread safe; needs no device call.
Result<CUtensorMap> tiles_of(const ConstTensorView& x_BTHD, int rows, int columns = 64);

}  // namespace everlong::cuda
