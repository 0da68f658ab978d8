// The chunk engine on Hopper against the float64 reference. Skipped where there is no such GPU.
#include <gtest/gtest.h>

#ifdef EVERLONG_WITH_CUDA
#include "mechanisms/lightning/lightning_cuda_sequences_test.h"
#endif

namespace everlong::lightning {
namespace {

#ifdef EVERLONG_WITH_CUDA

// bf16 roundings of 2^-9 of q, k, v's products, of S and of o: 2.9e-3 in the norm was measured at
// all sizes. A decay that is off by one token shows at 1e-2 or more.
constexpr double kTolerance = 4e-3;

void expect_forward_right(const Case& c) {
  expect_forward_right(c, cuda_forward, {kTolerance, kTolerance});
}
void expect_backward_right(const Case& c) {
  expect_backward_right(c, cuda_backward, {kTolerance, kTolerance});
}

class LightningHopper : public OnGpu {
 protected:
  LightningHopper() : OnGpu(90) {}
};

TEST_F(LightningHopper, ForwardIsRightAtEveryLengthOfTheTail) {
  for (const int tokens : {1, 2, 15, 63, 64, 65, 127, 128, 129, 500})
    for (const bool states : {false, true}) expect_forward_right({.T = tokens, .states = states});
}

TEST_F(LightningHopper, BackwardIsRightAtEveryLengthOfTheTail) {
  for (const int tokens : {1, 2, 15, 63, 64, 65, 127, 128, 129, 500})
    for (const bool states : {false, true}) expect_backward_right({.T = tokens, .states = states});
}

TEST_F(LightningHopper, HeadDimsAreFreeAndNeedNotAgree) {
  const std::pair<int, int> dims[] = {{8, 8},     {16, 128},  {64, 64},   {64, 128}, {128, 64},
                                      {96, 96},   {72, 40},   {72, 88},   {120, 16}, {40, 72},
                                      {256, 128}, {128, 256}, {256, 256}, {192, 72}, {136, 8},
                                      {40, 136},  {256, 64}};
  for (const auto& [K, V] : dims) {
    expect_forward_right({.K = K, .V = V});
    expect_backward_right({.K = K, .V = V});
  }
}

// A sequence much longer than the decay: ranges of all processors, warmed up; then parts with
// carried states; then one block alone.
TEST_F(LightningHopper, LongLinesAreCutInEveryWay) {
  Case c{.B = 1, .T = 64 * 140 + 37, .H = 2, .slope = {0.3, 0.05}};
  for (const auto& [K, V] : {std::pair(64, 64), std::pair(192, 72)})
    for (const bool exact : {false, true})
      for (const bool workspace : {false, true}) {
        c.K = K, c.V = V;
        c.exact = exact;
        c.workspace = workspace;
        expect_forward_right(c);
        expect_backward_right(c);
      }
  c.K = c.V = 64;
  c.slope = {0, 1e-5};  // nothing is ever forgotten
  c.exact = false;
  expect_forward_right(c);
  expect_backward_right(c);
}

// Few heads, whose states are handed on from part to part, exactly and as far as they reach.
TEST_F(LightningHopper, PartsHandTheirStatesOn) {
  for (const bool exact : {false, true})
    for (const std::int64_t dim : {64, 128}) {
      Case c{.B = 1, .T = 64 * 300 + 5, .H = 1, .K = dim, .V = dim, .slope = {1e-4}};
      c.exact = exact;
      expect_forward_right(c);
      expect_backward_right(c);
      c = {.B = 2, .T = 64 * 60, .H = 4, .K = dim, .V = dim, .slope = {0.5, 0.06, 4e-3, 0}};
      c.exact = exact;
      expect_forward_right(c);
      expect_backward_right(c);
    }
}

TEST_F(LightningHopper, SiluAndRowSquaresRideAlong) {
  for (const int dim : {64, 96, 128}) {
    Case c{.K = dim, .V = dim, .row_squares = true};
    expect_forward_right(c);
    c.silu_q = c.silu_k = true;
    for (const int tokens : {1, 63, 64, 65, 500}) {
      c.T = tokens;
      expect_forward_right(c);
    }
    c.silu_v = true;
    expect_forward_right(c);
    c.row_squares = c.silu_q = false;
    expect_forward_right(c);
  }
  Case packed{.B = 1,
              .K = 40,
              .V = 96,
              .cu_seqlens = {0, 1, 65, 193, 194, 258, 700, 717},
              .silu_q = true,
              .silu_v = true,
              .row_squares = true};
  packed.T = packed.cu_seqlens.back();
  expect_forward_right(packed);
  packed.silu_q = packed.silu_v = false;
  expect_forward_right(packed);
  for (const bool exact : {false, true})
    expect_forward_right({.B = 1,
                          .T = 64 * 140 + 37,
                          .H = 2,
                          .K = 128,
                          .V = 128,
                          .slope = {0.3, 1e-3},
                          .exact = exact,
                          .silu_q = true,
                          .silu_k = true,
                          .silu_v = true,
                          .row_squares = true});
}

// Far out silu is x or 0, and what is no number stays where it is.
TEST_F(LightningHopper, SiluOfExtremesIsFinite) {
  const Case c{.B = 1, .T = 64, .H = 1, .slope = {0.5}, .gap = 0};
  std::vector<double> values(size(c.T * c.K), 0.0);
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = rounded(c.dtype, (i % 2 == 0 ? -1.0 : 1.0) * std::pow(10.0, double(i % 37)));
  const Tokens k(c, c.K, 2), o(c, c.V);
  Memory q(values.size() * 2), v(values.size() * 2);
  write_values(q, c.dtype, std::vector<double>(values.size(), 1.0));
  write_values(v, c.dtype, values);
  const auto view = [&](const Memory& x) {
    return TensorView{x.data(), c.dtype, k.view().sizes, k.view().strides};
  };
  CudaForward call{.q_BTHK = view(q),
                   .k_BTHK = k.view(),
                   .v_BTHV = view(v),
                   .o_BTHV = o.view(),
                   .slope_H = c.slope,
                   .fused = {.silu_v = true}};
  ASSERT_TRUE(cuda_forward(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto out = o.read();
  EXPECT_TRUE(std::ranges::all_of(out, [](double x) { return std::isfinite(x); }));
}

TEST_F(LightningHopper, SlopesReachFromNothingToEverything) {
  expect_forward_right({.H = 4, .slope = {80, 8, 1e-5, 0}});
  expect_backward_right({.H = 4, .slope = {80, 8, 1e-5, 0}});
}

// Where nothing is forgotten every weight is 1 and every product of bf16 numbers exact in fp32:
// only the sums round.
TEST_F(LightningHopper, StatesOfExactProductsAreSumsInFp32) {
  Case c{.T = 1000, .slope = {0, 0, 0}};
  for (const int dim : {64, 96, 128}) {
    c.K = c.V = dim;
    expect_forward_right(c, cuda_forward, {kTolerance, 1e-5});
  }
  c = {.B = 1, .T = 64 * 140, .H = 2, .slope = {0, 0}};  // in parts
  expect_forward_right(c, cuda_forward, {kTolerance, 1e-5});
  c = {.B = 1, .slope = {0, 0, 0}, .cu_seqlens = {0, 1, 65, 193, 194, 258, 700, 717}};
  c.T = c.cu_seqlens.back();
  expect_forward_right(c, cuda_forward, {kTolerance, 1e-5});
}

// Ragged ends everywhere; what lies behind an end is another sequence.
TEST_F(LightningHopper, PackedSequencesKeepToThemselves) {
  Case c{.B = 1, .cu_seqlens = {0, 1, 65, 193, 194, 258, 700, 717}};
  c.T = c.cu_seqlens.back();
  for (const bool exact : {false, true})
    for (const auto& [K, V] : {std::pair(128, 128), std::pair(64, 64), std::pair(40, 96),
                               std::pair(256, 128), std::pair(104, 200)}) {
      c.exact = exact;
      c.K = K, c.V = V;
      expect_forward_right(c);
      expect_backward_right(c);
    }
  c.states = false;
  expect_forward_right(c);
  expect_backward_right(c);
}

TEST_F(LightningHopper, PackedSequencesMayBeLongAndEmpty) {
  Case c{.B = 1,
         .K = 64,
         .V = 64,
         .states = false,
         .exact = false,
         .cu_seqlens = {0, 0, 5000, 5000, 5070, 9001, 9001}};
  c.T = c.cu_seqlens.back();
  expect_forward_right(c);
  expect_backward_right(c);
}

// Infinities in a sequence stay there: 0 times infinity would be none.
TEST_F(LightningHopper, PackedSequencesDoNotSeeInfinities) {
  const Case c{.B = 1, .T = 200, .H = 1, .slope = {0.1}, .cu_seqlens = {0, 100, 200}};
  const Tokens q(c, c.K, 1), k(c, c.K, 2), v(c, c.V, 3), o(c, c.V);
  const Packing packing(c);
  for (const Tokens* x : {&k, &v}) {  // the second sequence's first token
    const std::vector<std::uint16_t> infinite(size(c.K), 0x7f80);
    ASSERT_EQ(cudaMemcpy(static_cast<std::uint16_t*>(x->view().data) + 100 * (c.K + 8),
                         infinite.data(), infinite.size() * 2, cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  CudaForward call{.q_BTHK = q.view(),
                   .k_BTHK = k.view(),
                   .v_BTHV = v.view(),
                   .o_BTHV = o.view(),
                   .slope_H = c.slope,
                   .packing = packing.view()};
  ASSERT_TRUE(cuda_forward(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto out = o.read();
  EXPECT_TRUE(
      std::all_of(&out[0], &out[size(100 * c.V)], [](double x) { return std::isfinite(x); }));
  EXPECT_FALSE(std::isfinite(out[size(150 * c.V)]));
}

TEST(LightningHopperRefuses, WhatDoesNotFit) {  // before any work: needs no device
  const std::vector<double> slope = {0.1, 0.2};
  alignas(16) float memory[4] = {};
  const Sizes sizes = {1, 4, 2, 64};
  CudaForward good;
  good.q_BTHK = good.k_BTHK = good.v_BTHV = {memory, DType::kBFloat16, sizes, dense_strides(sizes)};
  good.o_BTHV = {memory, DType::kBFloat16, sizes, dense_strides(sizes)};
  good.slope_H = slope;
  const auto expect_refused = [&](const char* what, auto change) {
    CudaForward call = good;
    change(call);
    EXPECT_FALSE(cuda_forward(call, nullptr).ok()) << what;
  };
  expect_refused("a head dim of 12",
                 [](CudaForward& c) { c.q_BTHK.sizes[3] = c.k_BTHK.sizes[3] = 12; });
  expect_refused("a head dim of 264",
                 [](CudaForward& c) { c.q_BTHK.sizes[3] = c.k_BTHK.sizes[3] = 264; });
  expect_refused("silu at a head dim of 256", [](CudaForward& c) {
    c.q_BTHK.sizes[3] = c.k_BTHK.sizes[3] = 256;
    c.fused.silu_q = true;
  });
  expect_refused("no tokens", [](CudaForward& c) {
    c.q_BTHK.sizes[1] = c.k_BTHK.sizes[1] = c.v_BTHV.sizes[1] = c.o_BTHV.sizes[1] = 0;
  });
  expect_refused("another T", [](CudaForward& c) { c.k_BTHK.sizes[1] = 3; });
  expect_refused("no output", [](CudaForward& c) { c.o_BTHV.data = nullptr; });
  expect_refused("a slope too many", [](CudaForward& c) { c.slope_H = c.slope_H.first(1); });
}

#endif

}  // namespace
}  // namespace everlong::lightning
