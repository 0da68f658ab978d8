// What the CUDA device of a tensor can run.
#pragma once
#include <c10/core/Device.h>

namespace everlong {

// Compute capability of a CUDA device, 10 times major plus minor (90: Hopper); 0: not a CUDA
// device, or this build has no CUDA. Asked of the driver once a device. Thread safe.
int compute_capability(c10::Device device);

}  // namespace everlong
