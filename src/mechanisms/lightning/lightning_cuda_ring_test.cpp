// The step that writes states behind, against the recurrence in float64. Skipped where there is no
// GPU from sm_80 on.
#include <gtest/gtest.h>

#ifdef EVERLONG_WITH_CUDA
#include "mechanisms/lightning/lightning_cuda_sequences_test.h"
#endif

namespace everlong::lightning {
namespace {

#ifdef EVERLONG_WITH_CUDA

using LightningRing = OnGpu;

struct Streams {
  std::int64_t K = 64, V = 64, R = 16;
  DType dtype = DType::kBFloat16;
  std::vector<double> slope = {8, 0.1, 4e-8};
  std::int64_t tokens = 40, B = 2, N = 2;
  std::vector<std::int64_t> slots = {};        // of B sequences; empty: each its own row
  std::vector<std::int32_t> waiting = {0, 0};  // at the start, [N]
};

// Steps of every sequence, rings at any filling, then a fold of all that waits.
void expect_streams_right(const Streams& c) {
  SCOPED_TRACE(testing::Message() << "K " << c.K << " V " << c.V << " R " << c.R << " "
                                  << info(c.dtype).name);
  const auto H = static_cast<std::int64_t>(c.slope.size());
  const double scale = 0.5;
  const auto row_of = [&](std::int64_t b) { return c.slots.empty() ? b : c.slots[size(b)]; };
  // Waiting tokens of the start: in the rings, and in the recurrence before the first step.
  auto state = random_values(size(c.N * H * c.K * c.V), DType::kFloat32, 1);
  const auto old_k = random_values(size(c.N * H * c.R * c.K), c.dtype, 2),
             old_v = random_values(size(c.N * H * c.R * c.V), c.dtype, 3);
  Memory state_memory(state.size() * 4), keys(old_k.size() * size_of(c.dtype)),
      values(old_v.size() * size_of(c.dtype)), waiting_memory(size(c.N) * 4),
      slot_memory(size(c.B) * 8);
  write_values(state_memory, DType::kFloat32, state);
  write_values(keys, c.dtype, old_k);
  write_values(values, c.dtype, old_v);
  if (!c.slots.empty()) slot_memory.write(c.slots.data());
  const auto advance = [&](std::int64_t n, std::int64_t h, const double* k, const double* v) {
    for (std::int64_t i = 0; i < c.K; ++i)
      for (std::int64_t j = 0; j < c.V; ++j) {
        double& s = state[size(((n * H + h) * c.K + i) * c.V + j)];
        s += s * std::expm1(-c.slope[size(h)]) + k[i] * v[j];
      }
  };
  auto waiting = c.waiting;
  for (std::int64_t n = 0; n < c.N; ++n)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t t = 0; t < waiting[size(n)]; ++t)
        advance(n, h, &old_k[size(((n * H + h) * c.R + t) * c.K)],
                &old_v[size(((n * H + h) * c.R + t) * c.V)]);

  const auto view = [](const Memory& memory, DType dtype, const Sizes& sizes) {
    return TensorView{memory.data(), dtype, sizes, dense_strides(sizes)};
  };
  CudaRingStep call;
  call.state_NHKV = view(state_memory, DType::kFloat32, {c.N, H, c.K, c.V});
  call.keys_NHRK = view(keys, c.dtype, {c.N, H, c.R, c.K});
  call.values_NHRV = view(values, c.dtype, {c.N, H, c.R, c.V});
  call.waiting_N = static_cast<const std::int32_t*>(waiting_memory.data());
  call.slot_B = c.slots.empty() ? nullptr : static_cast<const std::int64_t*>(slot_memory.data());
  call.slope_H = c.slope;
  call.scale = scale;
  std::vector<double> got, wanted;
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    const auto seed = static_cast<unsigned>(100 + 3 * t);
    const auto q = random_values(size(c.B * H * c.K), c.dtype, seed),
               k = random_values(size(c.B * H * c.K), c.dtype, seed + 1),
               v = random_values(size(c.B * H * c.V), c.dtype, seed + 2);
    Memory q_memory(q.size() * size_of(c.dtype)), k_memory(k.size() * size_of(c.dtype)),
        v_memory(v.size() * size_of(c.dtype)), o_memory(v.size() * size_of(c.dtype));
    write_values(q_memory, c.dtype, q);
    write_values(k_memory, c.dtype, k);
    write_values(v_memory, c.dtype, v);
    waiting_memory.write(waiting.data());
    call.q_B1HK = view(q_memory, c.dtype, {c.B, 1, H, c.K});
    call.k_B1HK = view(k_memory, c.dtype, {c.B, 1, H, c.K});
    call.v_B1HV = view(v_memory, c.dtype, {c.B, 1, H, c.V});
    call.o_B1HV = view(o_memory, c.dtype, {c.B, 1, H, c.V});
    const Status status = cuda_ring_step(call, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const auto o = read_values(o_memory, c.dtype);
    got.insert(got.end(), o.begin(), o.end());
    for (std::int64_t b = 0; b < c.B; ++b) {
      const std::int64_t n = row_of(b);
      for (std::int64_t h = 0; h < H; ++h) {
        if (n >= 0) advance(n, h, &k[size((b * H + h) * c.K)], &v[size((b * H + h) * c.V)]);
        for (std::int64_t j = 0; j < c.V; ++j) {
          double sum = 0;
          for (std::int64_t i = 0; n >= 0 && i < c.K; ++i)
            sum += q[size((b * H + h) * c.K + i)] * state[size(((n * H + h) * c.K + i) * c.V + j)];
          wanted.push_back(scale * sum);
        }
      }
      if (n >= 0) waiting[size(n)] = (waiting[size(n)] + 1) % static_cast<std::int32_t>(c.R);
    }
  }
  // One rounding of o, as in lightning_cuda_test.cpp; a single column may be rounded by more.
  const double rounding = c.dtype == DType::kBFloat16  ? 2.5e-3
                          : c.dtype == DType::kFloat16 ? 3.2e-4
                                                       : 1e-5;
  EXPECT_LT(relative_error(got, wanted), rounding);
  waiting_memory.write(waiting.data());
  call.q_B1HK = {};
  call.batch = c.B;
  ASSERT_TRUE(cuda_ring_step(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  // Rows that no sequence owns still have their tokens waiting: they were not touched.
  auto folded = read_values(state_memory, DType::kFloat32);
  for (std::int64_t n = 0; n < c.N; ++n) {
    bool owned = false;
    for (std::int64_t b = 0; b < c.B; ++b) owned = owned || row_of(b) == n;
    const std::size_t each = size(H * c.K * c.V), from = size(n) * each;
    if (!owned) std::copy_n(&state[from], each, &folded[from]);
  }
  EXPECT_LT(relative_error(folded, state), 1e-5);
}

TEST_F(LightningRing, IsTheRecurrenceForAllDimsAndDtypes) {
  const std::pair<int, int> dims[] = {{16, 16},   {64, 64}, {96, 96}, {128, 128},
                                      {256, 128}, {17, 23}, {1, 1},   {64, 130}};
  for (const auto& [K, V] : dims)
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      expect_streams_right({.K = K, .V = V, .dtype = dtype});
}

TEST_F(LightningRing, RingsMayBeOfAnyLengthAndFilling) {
  for (const int R : {1, 2, 5, 16, 64})
    expect_streams_right({.K = 128, .V = 64, .R = R, .tokens = R + 3, .waiting = {R - 1, R / 2}});
}

TEST_F(LightningRing, StatesMayBeLargeAndMany) {
  expect_streams_right({.K = 256, .V = 70, .R = 64, .dtype = DType::kFloat32, .tokens = 3});
  expect_streams_right({.K = 256, .V = 128, .R = 16, .tokens = 17});
  Streams many{.K = 16, .V = 16, .R = 4, .tokens = 5, .B = 150, .N = 150};
  many.slope.assign(9, 0.01);
  many.waiting.assign(150, 0);
  for (std::size_t n = 0; n < 150; ++n) many.waiting[n] = static_cast<std::int32_t>(n % 4);
  expect_streams_right(many);
}

TEST_F(LightningRing, SequencesFindTheirRingsBySlotAndEmptyPlacesAreLeftAlone) {
  expect_streams_right({.B = 3, .N = 4, .slots = {3, -1, 1}, .waiting = {0, 7, 0, 15}});
}

// A factor exp(-4e-8) a token in fp32 would be wrong by half; folds decay by 16 tokens at once.
TEST_F(LightningRing, ManyStepsDriftLittle) {
  expect_streams_right({.K = 16,
                        .V = 16,
                        .dtype = DType::kFloat32,
                        .slope = {4e-8, 1e-4},
                        .tokens = 1 << 12,
                        .B = 1,
                        .N = 1,
                        .waiting = {0}});
}

TEST(LightningRingRefuses, WhatDoesNotFit) {  // before any work: needs no device
  const std::vector<double> slope = {0.1, 0.2};
  float memory[4] = {};
  const std::int32_t waiting = 0;
  const Sizes sizes = {1, 1, 2, 16}, state_sizes = {1, 2, 16, 16};
  CudaRingStep good;
  good.q_B1HK = good.k_B1HK = good.v_B1HV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.o_B1HV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.state_NHKV = {memory, DType::kFloat32, state_sizes, dense_strides(state_sizes)};
  good.keys_NHRK = good.values_NHRV = good.state_NHKV;
  good.waiting_N = &waiting;
  good.slope_H = slope;
  const auto expect_refused = [&](const char* what, auto change) {
    CudaRingStep call = good;
    change(call);
    EXPECT_FALSE(cuda_ring_step(call, nullptr).ok()) << what;
  };
  expect_refused("a ring of another dtype",
                 [](CudaRingStep& c) { c.values_NHRV.dtype = DType::kBFloat16; });
  expect_refused("a ring of none",
                 [](CudaRingStep& c) { c.keys_NHRK.sizes[2] = c.values_NHRV.sizes[2] = 0; });
  expect_refused("a ring of 65",
                 [](CudaRingStep& c) { c.keys_NHRK.sizes[2] = c.values_NHRV.sizes[2] = 65; });
  expect_refused("another K", [](CudaRingStep& c) { c.q_B1HK.sizes[3] = 8; });
  expect_refused("mixed dtypes", [](CudaRingStep& c) { c.v_B1HV.dtype = DType::kBFloat16; });
  expect_refused("nobody knows what waits", [](CudaRingStep& c) { c.waiting_N = nullptr; });
  expect_refused("a state too many", [](CudaRingStep& c) {
    c.state_NHKV.sizes[0] = c.keys_NHRK.sizes[0] = c.values_NHRV.sizes[0] = 2;
  });
  expect_refused("a slope too many", [](CudaRingStep& c) { c.slope_H = c.slope_H.first(1); });
}

#endif

}  // namespace
}  // namespace everlong::lightning
