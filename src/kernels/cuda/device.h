// What the GPU is and how fast its memory really is: the ceiling that benchmarks hold kernels
// against.
#pragma once
#include <cstdint>
#include <string>

#include "core/status.h"

namespace everlong::cuda {

struct DeviceInfo {
  std::string name;
  int multiprocessors = 0;
  int major = 0, minor = 0;  // compute capability
  std::int64_t memory_bytes = 0, l2_bytes = 0;
};

// Refused where no such device or no driver is present, or where this build has no CUDA. Thread
// safe.
Result<DeviceInfo> device_info(int device);

// Bytes per second, read plus written, of the best of `rounds` copies of `bytes` on the device.
// Allocates 2 * bytes there for the time of the call; choose them well above the L2 cache.
Result<double> measure_copy_bandwidth(int device, std::int64_t bytes, int rounds);

}  // namespace everlong::cuda
