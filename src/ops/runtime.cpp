#include "ops/runtime.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <torch/headeronly/version.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <vector>

#include "core/dtype.h"

namespace everlong {
namespace {

constexpr const char* kCudaLibrary = "libtorch_cuda.so";

bool driver_present() {
  std::error_code ignored;
  return std::filesystem::exists("/dev/nvidiactl", ignored) ||
         std::filesystem::exists("/proc/driver/nvidia/version", ignored);
}

Status open_cuda_library() {
  if (!driver_present())
    return unsupported(
        "no NVIDIA driver was found on this machine (no /dev/nvidiactl); use --device cpu");
  if (::dlopen(kCudaLibrary, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    const char* const reason = ::dlerror();
    return unsupported(
        "the CUDA half of LibTorch cannot be opened: ",
        reason != nullptr ? reason : "unknown reason",
        ". EVERLONG_TORCH=full make setup installs the libraries it needs; or use --device cpu");
  }
  if (!at::globalContext().hasCUDA())
    return unsupported("LibTorch was used before its CUDA half was opened and keeps to the CPU");
  return {};
}

int gpu_count() { return static_cast<int>(at::getNumGPUs()); }

std::int64_t status_kilobytes(std::string_view key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key)) return std::strtoll(line.c_str() + key.size(), nullptr, 10);
  return 0;
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

// Through the driver's C interface, which torch has loaded by now: torch's own needs its CUDA half
// at link time.
std::string gpu_name(int index) {
  using GetDevice = int (*)(int*, int);
  using GetName = int (*)(char*, int, int);
  void* const driver = ::dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return "NVIDIA GPU";
  const auto get_device = reinterpret_cast<GetDevice>(::dlsym(driver, "cuDeviceGet"));
  const auto get_name = reinterpret_cast<GetName>(::dlsym(driver, "cuDeviceGetName"));
  char name[256] = "NVIDIA GPU";
  int device = 0;
  if (get_device != nullptr && get_name != nullptr && get_device(&device, index) == 0)
    get_name(name, sizeof name, device);
  ::dlclose(driver);
  return name;
}

}  // namespace

Status load_cuda_backend() {
  static std::once_flag once;
  static Status status;
  std::call_once(once, [] { status = open_cuda_library(); });
  return status;
}

Result<at::Device> pick_device(std::string_view wish) {
  if (wish == "cpu") return at::Device(at::kCPU);
  const bool automatic = wish == "auto";
  int index = 0;
  if (!automatic && wish != "cuda") {
    const auto number = wish.starts_with("cuda:") ? parse_count(wish.substr(5)) : std::nullopt;
    if (!number || *number < 0 || *number > 127)
      return invalid_argument("device \"", wish,
                              "\" is not known; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...");
    index = static_cast<int>(*number);
  }
  const Status loaded = load_cuda_backend();
  if (!loaded.ok())
    return automatic ? Result<at::Device>(at::Device(at::kCPU)) : loaded.at(cat("device ", wish));
  const int count = gpu_count();
  if (automatic && count == 0) return at::Device(at::kCPU);
  if (index >= count)
    return unsupported(
        "device ", wish, ": this process sees ", count, " GPU", count == 1 ? "" : "s",
        count == 0 ? "; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
                   : cat("; allowed: cuda:0 to cuda:", count - 1));
  return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index));
}

Result<at::ScalarType> pick_dtype(std::string_view wish, at::Device device) {
  if (wish == "auto") return device.is_cuda() ? at::kBFloat16 : at::kFloat;
  if (wish == "fp32") return at::kFloat;
  if (wish == "bf16") return at::kBFloat16;
  if (wish == "fp64") return at::kDouble;
  return invalid_argument("dtype \"", wish, "\" is not known; allowed: auto, fp32, bf16, fp64");
}

std::string_view dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return info(DType::kFloat32).name;
    case at::kBFloat16:
      return info(DType::kBFloat16).name;
    case at::kDouble:
      return info(DType::kFloat64).name;
    case at::kHalf:
      return info(DType::kFloat16).name;
    default:
      return c10::toString(dtype);
  }
}

Status set_threads(std::int64_t wanted) {
  if (wanted < 0 || wanted > 1024)
    return invalid_argument("threads = ", wanted,
                            " is out of range; allowed: 1 to 1024, or 0 for torch's choice");
  if (wanted > 0) at::set_num_threads(static_cast<int>(wanted));
  return {};
}

int threads() { return at::get_num_threads(); }

void synchronize(at::Device device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

void keep_freed_memory(FreedBlocks blocks) {
#ifdef __GLIBC__
  struct Setting {
    const char* name;
    int parameter, value;
  };
  constexpr int kMost = 32 << 20;  // of M_MMAP_THRESHOLD: glibc refuses more
  std::vector<Setting> settings = {{"MALLOC_ARENA_MAX", M_ARENA_MAX, 1},
                                   {"MALLOC_MMAP_THRESHOLD_", M_MMAP_THRESHOLD, kMost}};
  if (blocks == FreedBlocks::kUsual) {
    settings.push_back({"MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD, 256 << 20});
  } else {
    settings.push_back({"MALLOC_MMAP_MAX_", M_MMAP_MAX, 0});
    settings.push_back({"MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD, -1});  // never
  }
  for (const Setting& s : settings)
    if (std::getenv(s.name) == nullptr) ::mallopt(s.parameter, s.value);
#endif
}

std::int64_t resident_bytes() { return status_kilobytes("VmRSS:") * 1024; }
std::int64_t peak_resident_bytes() { return status_kilobytes("VmHWM:") * 1024; }

bool reset_resident_peak() {
  std::ofstream file("/proc/self/clear_refs");
  file << 5 << std::flush;  // proc(5): resets the peak of the resident set
  return file.good();
}

std::optional<DeviceMemory> device_memory(at::Device device) {
  if (device.is_cpu()) return std::nullopt;
  auto* const allocator = c10::getDeviceAllocator(device.type());
  if (!allocator->initialized()) return DeviceMemory{};
  const auto stats = allocator->getDeviceStats(device.index());
  const auto& bytes =
      stats.allocated_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  return DeviceMemory{bytes.current, bytes.peak};
}

void reset_device_peak(at::Device device) {
  if (device.is_cpu()) return;
  auto* const allocator = c10::getDeviceAllocator(device.type());
  if (allocator->initialized()) allocator->resetPeakStats(device.index());
}

RuntimeInfo runtime_info() {
  RuntimeInfo about;
  about.torch = TORCH_VERSION;
  about.processor = processor_name();
  if (driver_present()) {
    if (const Status loaded = load_cuda_backend(); loaded.ok()) {
      for (int i = 0; i < gpu_count(); ++i) about.gpus.push_back(gpu_name(i));
    } else {
      about.cuda_trouble = loaded.message();
    }
  }
  about.simd = at::get_cpu_capability();
  about.threads = threads();
  return about;
}

std::string machine_name(at::Device device) {
  return device.is_cpu() ? processor_name() : gpu_name(std::max<int>(device.index(), 0));
}

}  // namespace everlong
