#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace everlong::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is already loaded, so that nothing links to it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

Result<CUtensorMap> tiles_of(const ConstTensorView& x, int rows, int columns) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return unsupported("CUDA: this driver knows no tensor maps (12.0 needed)");
  if (x.dtype != DType::kBFloat16)
    return unsupported("CUDA: tiles are bf16; given ", info(x.dtype).name);
  const auto [B, T, H, D] = x.sizes;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(T),
                              static_cast<cuuint64_t>(H), static_cast<cuuint64_t>(B)};
  cuuint64_t strides[3];
  const std::int64_t steps[] = {x.strides[1], x.strides[2], x.strides[0]};
  for (int i = 0; i < 3; ++i) {
    // A dimension of size 1 may carry any stride.
    const std::int64_t bytes = sizes[i + 1] == 1 ? 16 : steps[i] * 2;
    if (bytes <= 0 || bytes % 16 != 0 || bytes >= (std::int64_t{1} << 40))
      return unsupported(
          "CUDA: tile copies need positive strides of multiples of 8 elements; given ", steps[i]);
    strides[i] = static_cast<cuuint64_t>(bytes);
  }
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0 || (x.strides[3] != 1 && D != 1))
    return unsupported(
        "CUDA: tile copies need a base at a multiple of 16 bytes and a contiguous "
        "last dimension");
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1},
                   ones[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(x.data), sizes, strides,
             box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             columns == 64 ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return unsupported("CUDA: the tensor [", B, ", ", T, ", ", H, ", ", D,
                       "] cannot be described for tile copies (CUresult ", static_cast<int>(result),
                       ")");
  return map;
}

}  // namespace everlong::cuda
