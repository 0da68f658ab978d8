// The CUDA sweep against the float64 reference. Skipped where there is no GPU from sm_80 on.
#include <gtest/gtest.h>

#ifdef EVERLONG_WITH_CUDA
#include "mechanisms/lightning/lightning_cuda_sequences_test.h"
#endif

namespace everlong::lightning {
namespace {

#ifdef EVERLONG_WITH_CUDA

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// bf16: as the Hopper engine. fp16: sums of numbers rounded to 11 bits, 2^-12 of the norm each, and
// o likewise; of a single element up to 2^-11 each. fp32: products good to 2^-22, summed in fp32.
Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {4e-3, 4e-3};
    case DType::kFloat16:
      return {1e-3, 1e-3};
    default:
      return {5e-6, 5e-6};
  }
}

void expect_right(Case c, std::span<const DType> dtypes = kDTypes) {
  for (const DType dtype : dtypes) {
    c.dtype = dtype;
    expect_forward_right(c, cuda_sweep_forward, tolerance(dtype));
    expect_backward_right(c, cuda_sweep_backward, tolerance(dtype));
  }
}

using LightningSweep = OnGpu;

TEST_F(LightningSweep, IsRightAtEveryLengthOfTheTail) {
  for (const int tokens : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 200})
    for (const bool states : {false, true})
      expect_right({.T = tokens, .K = 64, .V = 48, .states = states});
}

TEST_F(LightningSweep, HeadDimsAreFreeAndNeedNotAgree) {
  const std::pair<int, int> dims[] = {{1, 1},     {16, 16},   {32, 80},   {96, 96},
                                      {128, 128}, {256, 128}, {128, 256}, {256, 256},
                                      {17, 23},   {129, 40},  {200, 8},   {64, 33}};
  for (const auto& [K, V] : dims)
    expect_right({.B = 1, .T = 150, .H = 2, .K = K, .V = V, .slope = {0.3, 0.001}});
}

// Rows that start at odd places.
TEST_F(LightningSweep, StridesAreFree) {
  expect_right({.K = 128, .V = 64, .gap = 1});
  expect_right({.K = 200, .V = 72, .gap = 3});
}

// One head alone is cut into parts with carried states, unless there is no memory for them.
TEST_F(LightningSweep, LongLinesAreCut) {
  for (const bool workspace : {true, false})
    for (const int tokens : {64 * 90 + 37, 64 * 33})
      expect_right({.B = 1,
                    .T = tokens,
                    .H = 2,
                    .K = 64,
                    .V = 40,
                    .slope = {1e-3, 0},
                    .workspace = workspace});
}

TEST_F(LightningSweep, SlopesReachFromNothingToEverything) {
  expect_right({.H = 4, .K = 64, .V = 64, .slope = {80, 8, 1e-5, 0}});
}

TEST_F(LightningSweep, PackedSequencesKeepToThemselves) {
  Case c{.B = 1, .K = 128, .V = 64, .cu_seqlens = {0, 1, 65, 193, 194, 258, 700, 717}};
  c.T = c.cu_seqlens.back();
  expect_right(c);
  c.cu_seqlens = {0, 717};
  expect_right(c);
  c = {.B = 1,
       .K = 64,
       .V = 64,
       .states = false,
       .cu_seqlens = {0, 0, 4000, 4000, 4070, 6001, 6001}};
  c.T = c.cu_seqlens.back();
  expect_right(c);
}

// The own part of a chunk is summed before it is added: 2^18 tokens drift as little as fp32 sums
// do.
TEST_F(LightningSweep, LongStreamsDriftLittle) {
  const Case c{.B = 1,
               .T = 1 << 18,
               .H = 1,
               .K = 16,
               .V = 16,
               .slope = {4e-8},
               .workspace = false,
               .dtype = DType::kFloat32};
  expect_forward_right(c, cuda_sweep_forward, {1e-5, 1e-5});
}

TEST_F(LightningSweep, StatesMayBeReplacedInPlace) {
  const Case c{.B = 1, .T = 3000, .H = 1, .K = 64, .V = 64, .slope = {1e-3}};
  const Tokens q(c, c.K, 1), k(c, c.K, 2), v(c, c.V, 3), o(c, c.V);
  const States in(c, 4), out(c, 0);
  const Memory workspace(size(cuda_workspace_bytes(c.B, c.H, c.K, c.V)));
  CudaForward call{.q_BTHK = q.view(),
                   .k_BTHK = k.view(),
                   .v_BTHV = v.view(),
                   .o_BTHV = o.view(),
                   .state_in_NHKV = in.view(),
                   .state_out_NHKV = out.view(),
                   .slope_H = c.slope,
                   .workspace = workspace.data()};
  ASSERT_TRUE(cuda_sweep_forward(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto apart = out.read();
  call.state_out_NHKV = in.view();
  ASSERT_TRUE(cuda_sweep_forward(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_LT(relative_error(in.read(), apart), 1e-5);
}

TEST(LightningSweepRefuses, WhatDoesNotFit) {  // before any work: needs no device
  const std::vector<double> slope = {0.1, 0.2};
  alignas(16) float memory[4] = {};
  const Sizes sizes = {1, 4, 2, 64};
  CudaForward good;
  good.q_BTHK = good.k_BTHK = good.v_BTHV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.o_BTHV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.slope_H = slope;
  const auto expect_refused = [&](const char* what, auto change) {
    CudaForward call = good;
    change(call);
    EXPECT_FALSE(cuda_sweep_forward(call, nullptr).ok()) << what;
  };
  expect_refused("a head dim of 257",
                 [](CudaForward& c) { c.q_BTHK.sizes[3] = c.k_BTHK.sizes[3] = 257; });
  expect_refused("fp64", [](CudaForward& c) {
    c.q_BTHK.dtype = c.k_BTHK.dtype = c.v_BTHV.dtype = c.o_BTHV.dtype = DType::kFloat64;
  });
  expect_refused("mixed dtypes", [](CudaForward& c) { c.v_BTHV.dtype = DType::kBFloat16; });
  expect_refused("another dtype of o", [](CudaForward& c) { c.o_BTHV.dtype = DType::kBFloat16; });
  expect_refused("a column apart", [](CudaForward& c) { c.q_BTHK.strides[3] = 2; });
  expect_refused("no tokens", [](CudaForward& c) {
    c.q_BTHK.sizes[1] = c.k_BTHK.sizes[1] = c.v_BTHV.sizes[1] = c.o_BTHV.sizes[1] = 0;
  });
  expect_refused("no output", [](CudaForward& c) { c.o_BTHV.data = nullptr; });
  expect_refused("a slope too many", [](CudaForward& c) { c.slope_H = c.slope_H.first(1); });
}

#endif

}  // namespace
}  // namespace everlong::lightning
