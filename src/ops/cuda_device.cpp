#include "ops/cuda_device.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "kernels/cuda/device.h"

namespace everlong {

int compute_capability(c10::Device device) {
  static std::mutex mutex;
  static std::array<int, 64> known{};  // 0: not asked yet; -1: none
  const auto index = static_cast<std::size_t>(device.index() < 0 ? 0 : device.index());
  if (!device.is_cuda() || index >= known.size()) return 0;
  const std::lock_guard lock(mutex);
  if (known[index] == 0) {
    const auto info = cuda::device_info(static_cast<int>(index));
    known[index] = info.ok() ? info->major * 10 + info->minor : -1;
  }
  return std::max(known[index], 0);
}

}  // namespace everlong
