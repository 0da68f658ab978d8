// Stands in where the build has no CUDA.
#ifndef EVERLONG_WITH_CUDA
#include "mechanisms/lightning/kernel_cuda.h"

namespace everlong::lightning {

namespace {
Status no_cuda() {
  return unsupported(
      "lightning: this build has no CUDA kernels; install CUDA 13 and build again with "
      "EVERLONG_CUDA=ON");
}
}  // namespace

Status cuda_step(const CudaStep&, void*) { return no_cuda(); }
Status cuda_ring_step(const CudaRingStep&, void*) { return no_cuda(); }
Status cuda_forward(const CudaForward&, void*) { return no_cuda(); }
Status cuda_backward(const CudaBackward&, void*) { return no_cuda(); }
Status cuda_sweep_forward(const CudaForward&, void*) { return no_cuda(); }
Status cuda_sweep_backward(const CudaBackward&, void*) { return no_cuda(); }
void cuda_offsets(std::span<const std::int64_t>, std::span<std::int32_t>) {}
std::int64_t cuda_workspace_bytes(std::int64_t, std::int64_t, std::int64_t, std::int64_t) {
  return 0;
}

}  // namespace everlong::lightning
#endif
