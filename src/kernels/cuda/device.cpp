// Stands in where the build has no CUDA.
#ifndef EVERLONG_WITH_CUDA
#include "kernels/cuda/device.h"

namespace everlong::cuda {

Result<DeviceInfo> device_info(int) {
  return unsupported(
      "CUDA: this build has no CUDA kernels; install CUDA 13 and build again with "
      "EVERLONG_CUDA=ON");
}

Result<double> measure_copy_bandwidth(int, std::int64_t, int) { return device_info(0).status(); }

}  // namespace everlong::cuda
#endif
