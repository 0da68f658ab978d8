// The machine that torch runs on: which device, how many threads, how much memory.
//
// The program is linked to the CPU half of torch only and starts in a third of a second. The CUDA
// half is opened when a GPU is asked for. It must come before torch first looks for CUDA: torch
// remembers that there was none. So every program calls pick_device() before it makes a tensor.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong {

// Opens libtorch_cuda.so (found through the program's RPATH or LD_LIBRARY_PATH). Succeeds again and
// again once it did.
Status load_cuda_backend();

// "cpu", "cuda", "cuda:1", or "auto": the first GPU where there is one that works, else the CPU. A
// wish for CUDA that cannot be met says why and what to do.
Result<at::Device> pick_device(std::string_view wish);

// "fp32", "bf16", "fp64", or "auto": bf16 on CUDA, else fp32 (bf16 products are slower than fp32
// ones on most CPUs).
Result<at::ScalarType> pick_dtype(std::string_view wish, at::Device device);
std::string_view dtype_name(at::ScalarType dtype);  // "fp32"

// Threads of torch's pool, used by kernels and matrix products alike. 0 keeps torch's choice; else
// 1 to 1024.
Status set_threads(std::int64_t threads);
int threads();

// Waits until the device has done all it was given. Nothing to do on the CPU.
void synchronize(at::Device device);

// The C library's allocator keeps what is freed, in one pool for all threads, instead of handing
// large blocks back to the system and taking them anew (page faults were a third of the time of a
// stream, docs/benchmarks.md). For programs, before they compute; settings that the user has made
// in the environment (MALLOC_*) stay.
enum class FreedBlocks {
  kUsual,    // up to 32 MiB each, 256 MiB at the end of the heap
  kAnySize,  // all: a training step over long rows is 1.5 times as fast, with 1.4 times the memory
};
void keep_freed_memory(FreedBlocks blocks);

std::int64_t resident_bytes();       // VmRSS of this process
std::int64_t peak_resident_bytes();  // VmHWM: the most since the start, or since the last reset
// Starts the peak anew. False where the system does not allow it; then the old peak stands.
bool reset_resident_peak();
// Bytes of tensors alive now, and at most since the last reset_device_peak(). Nothing on the CPU.
struct DeviceMemory {
  std::int64_t allocated = 0, peak = 0;
};
std::optional<DeviceMemory> device_memory(at::Device device);
void reset_device_peak(at::Device device);

struct RuntimeInfo {
  std::string torch;      // "2.11.0"
  std::string simd;       // "AVX512": the widest that torch's CPU kernels use here
  std::string processor;  // "Intel(R) Xeon(R) ..."
  int threads = 1;
  std::vector<std::string> gpus;  // names; empty: none, or the CUDA half cannot be opened
  std::string cuda_trouble;  // why a GPU that seems to be there cannot be used; empty otherwise
};
RuntimeInfo runtime_info();
// The machine in a few words, for benchmark records: the GPU's name, or the processor's.
std::string machine_name(at::Device device);

}  // namespace everlong
