// What the CUDA device of a tensor can run, and small tables on it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <span>

namespace everlong {

// Compute capability of a CUDA device, 10 times major plus minor (90: Hopper); 0: not a CUDA
// device, or this build has no CUDA. Asked of the driver once a device. Thread safe.
int compute_capability(c10::Device device);

// These numbers on a CUDA device, int32 [N], by way of pinned memory: the host waits for nothing,
// and what runs next on the current stream finds them there. Thread safe.
at::Tensor send_to_device(std::span<const std::int32_t> numbers, c10::Device device);

}  // namespace everlong
