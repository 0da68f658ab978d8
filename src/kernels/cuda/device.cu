#include <cuda_runtime.h>

#include "kernels/cuda/device.h"

namespace everlong::cuda {
namespace {

Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return unsupported("CUDA: ", what, ": ", cudaGetErrorString(error));
}

// from, to [words] of 16 bytes; grid-stride, so that any grid covers any size. Four loads are in
// flight before the first store: one is not enough to hide the latency of HBM.
__global__ void copy_words(const uint4* __restrict__ from, uint4* __restrict__ to,
                           std::int64_t words) {
  constexpr int kInFlight = 4;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words;
       i += kInFlight * stride) {
    uint4 word[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (i + j * stride < words) word[j] = from[i + j * stride];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (i + j * stride < words) to[i + j * stride] = word[j];
  }
}

// Device memory, events and the device that was current before: released in every case.
class CopyBench {
 public:
  explicit CopyBench(int device) {
    (void)cudaGetDevice(&previous_);
    (void)cudaSetDevice(device);
  }
  ~CopyBench() {
    (void)cudaFree(from_);
    (void)cudaFree(to_);
    if (start_ != nullptr) (void)cudaEventDestroy(start_);
    if (stop_ != nullptr) (void)cudaEventDestroy(stop_);
    (void)cudaSetDevice(previous_);
  }
  CopyBench(const CopyBench&) = delete;
  CopyBench& operator=(const CopyBench&) = delete;

  Result<double> run(std::int64_t bytes, int rounds, int blocks) {
    EVERLONG_RETURN_IF_ERROR(check(cudaMalloc(&from_, bytes), "allocating the source"));
    EVERLONG_RETURN_IF_ERROR(check(cudaMalloc(&to_, bytes), "allocating the target"));
    EVERLONG_RETURN_IF_ERROR(check(cudaMemset(from_, 0x5a, bytes), "filling the source"));
    EVERLONG_RETURN_IF_ERROR(check(cudaEventCreate(&start_), "creating an event"));
    EVERLONG_RETURN_IF_ERROR(check(cudaEventCreate(&stop_), "creating an event"));
    double best = 0;
    for (int round = 0; round <= rounds; ++round) {
      (void)cudaEventRecord(start_);
      copy_words<<<blocks, 512>>>(static_cast<const uint4*>(from_), static_cast<uint4*>(to_),
                                  bytes / 16);
      (void)cudaEventRecord(stop_);
      EVERLONG_RETURN_IF_ERROR(check(cudaEventSynchronize(stop_), "copying"));
      EVERLONG_RETURN_IF_ERROR(check(cudaGetLastError(), "launching the copy"));
      float milliseconds = 0;
      EVERLONG_RETURN_IF_ERROR(
          check(cudaEventElapsedTime(&milliseconds, start_, stop_), "reading the time"));
      const double rate = 2.0 * static_cast<double>(bytes / 16 * 16) / (milliseconds * 1e-3);
      if (round > 0 && rate > best) best = rate;  // the first round warms up
    }
    return best;
  }

 private:
  int previous_ = 0;
  void *from_ = nullptr, *to_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

}  // namespace

Result<DeviceInfo> device_info(int device) {
  cudaDeviceProp properties{};
  EVERLONG_RETURN_IF_ERROR(
      check(cudaGetDeviceProperties(&properties, device), "asking what the device is"));
  DeviceInfo info;
  info.name = properties.name;
  info.multiprocessors = properties.multiProcessorCount;
  info.major = properties.major;
  info.minor = properties.minor;
  info.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  info.l2_bytes = properties.l2CacheSize;
  return info;
}

Result<double> measure_copy_bandwidth(int device, std::int64_t bytes, int rounds) {
  if (bytes < 16 || rounds < 1)
    return invalid_argument("copy bandwidth: ", bytes, " bytes in ", rounds,
                            " rounds; at least 16 and 1 are needed");
  EVERLONG_ASSIGN(const DeviceInfo info, device_info(device));
  CopyBench bench(device);
  return bench.run(bytes, rounds, 8 * info.multiprocessors);
}

}  // namespace everlong::cuda
