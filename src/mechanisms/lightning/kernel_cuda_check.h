// What every CUDA kernel of whole sequences refuses, whatever its dims and dtypes.
#pragma once
#include <span>

#include "mechanisms/lightning/kernel_cuda.h"

namespace everlong::lightning {

struct CudaTensors {
  ConstTensorView q_BTHK, k_BTHK, v_BTHV;
  std::span<const ConstTensorView> like_q, like_v;  // must be there, of the shapes of q and v
  std::span<const ConstTensorView> states_NHKV;     // fp32, may be absent
  std::span<const double> slope_H;
  CudaPacking packing;

  std::int64_t sequences() const;
};

Status check(const CudaTensors& call);

}  // namespace everlong::lightning
