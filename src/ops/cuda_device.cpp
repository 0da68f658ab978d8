#include "ops/cuda_device.h"

#include <ATen/ops/empty.h>

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

at::Tensor send_to_device(std::span<const std::int32_t> numbers, c10::Device device) {
  const at::Tensor pinned =
      at::empty({std::ssize(numbers)}, at::TensorOptions(at::kInt).pinned_memory(true));
  std::ranges::copy(numbers, pinned.mutable_data_ptr<std::int32_t>());
  return pinned.to(device, /*non_blocking=*/true);
}

}  // namespace everlong
