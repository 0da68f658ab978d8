// Tensors on a GPU for the tests of this room. Only in builds with CUDA.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/tensor_view.h"

namespace everlong::lightning {

inline std::size_t size_of(DType dtype) { return info(dtype).bytes; }

inline void encode(DType dtype, double value, void* to) {
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat16 x(static_cast<float>(value));
    std::memcpy(to, &x, sizeof x);
  } else if (dtype == DType::kFloat16) {
    const __half x(static_cast<float>(value));
    std::memcpy(to, &x, sizeof x);
  } else {
    const auto x = static_cast<float>(value);
    std::memcpy(to, &x, sizeof x);
  }
}
inline double decode(DType dtype, const void* from) {
  if (dtype == DType::kBFloat16) {
    __nv_bfloat16 x;
    std::memcpy(&x, from, sizeof x);
    return static_cast<float>(x);
  }
  if (dtype == DType::kFloat16) {
    __half x;
    std::memcpy(&x, from, sizeof x);
    return static_cast<float>(x);
  }
  float x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline double rounded(DType dtype, double value) {
  char bytes[4];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

// Device memory, filled with NaN (0xff bytes) so that what nothing wrote is seen.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes) {
    EXPECT_EQ(cudaMalloc(&data_, std::max<std::size_t>(bytes, 16)), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0xff, bytes), cudaSuccess);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { (void)cudaFree(data_); }
  void* data() const { return data_; }
  void write(const void* from) {
    EXPECT_EQ(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice), cudaSuccess);
  }
  std::vector<char> read() const {
    std::vector<char> out(bytes_);
    EXPECT_EQ(cudaMemcpy(out.data(), data_, bytes_, cudaMemcpyDeviceToHost), cudaSuccess);
    return out;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

inline void write_values(Memory& memory, DType dtype, const std::vector<double>& values) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i)
    encode(dtype, values[i], &bytes[i * size_of(dtype)]);
  memory.write(bytes.data());
}
inline std::vector<double> read_values(const Memory& memory, DType dtype) {
  const std::vector<char> bytes = memory.read();
  std::vector<double> values(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = decode(dtype, &bytes[i * size_of(dtype)]);
  return values;
}

inline std::vector<double> random_values(std::size_t count, DType dtype, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (double& value : values) value = rounded(dtype, normal(generator));
  return values;
}

inline double relative_error(const std::vector<double>& got, const std::vector<double>& wanted) {
  if (got.size() != wanted.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    norm += wanted[i] * wanted[i];
  }
  return std::sqrt(difference) / (std::sqrt(norm) + 1e-30);
}

using Sizes = std::array<std::int64_t, 4>;
inline Sizes dense_strides(const Sizes& n) { return {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}; }

// Skips where there is no GPU of at least this compute capability (90 takes 9.0 alone).
class OnGpu : public testing::Test {
 protected:
  explicit OnGpu(int capability = 80) : capability_(capability) {}
  void SetUp() override {
    int devices = 0, major = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device here";
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    if (major != capability_ / 10 && !(capability_ == 80 && major == 9))
      GTEST_SKIP() << "this GPU is not one of sm_" << capability_;
  }

 private:
  int capability_;
};

}  // namespace everlong::lightning
