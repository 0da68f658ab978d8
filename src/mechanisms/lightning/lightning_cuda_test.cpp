// The CUDA kernels against the float64 reference. Skipped where there is no GPU that they run on.
#include <gtest/gtest.h>

#include "mechanisms/lightning/kernel_cuda.h"
#include "mechanisms/lightning/reference.h"
#ifdef EVERLONG_WITH_CUDA
#include "mechanisms/lightning/lightning_cuda_test.h"
#endif

namespace everlong::lightning {
namespace {

#ifndef EVERLONG_WITH_CUDA

TEST(LightningCuda, BuildWithoutCudaSaysSo) {
  const Status status = cuda_step({}, nullptr);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("EVERLONG_CUDA=ON"), std::string::npos) << status.message();
}

#else

// One rounding of o to bf16 is 2^-9 of an element, at most that of the norm; half as bits: 2^-12.
// fp32 sums of up to 256 products stay far below 1e-5.
double tolerance(DType dtype) {
  return dtype == DType::kBFloat16 ? 2e-3 : dtype == DType::kFloat16 ? 2.5e-4 : 1e-5;
}

struct Case {
  std::int64_t B = 3, H = 4, K = 64, V = 64;
  DType dtype = DType::kFloat32;
  bool in_place = false, initial = true;
  std::vector<double> slope = {8, 0.1, 3.9e-3, 0};
};

// One step of `c`, with q, k and v packed head by head as [q | k | v] in one tensor.
void expect_step_right(const Case& c) {
  SCOPED_TRACE(testing::Message() << "B " << c.B << " K " << c.K << " V " << c.V << " "
                                  << info(c.dtype).name << (c.in_place ? " in place" : ""));
  const auto count = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const auto q = random_values(count(c.B * c.H * c.K), c.dtype, 1);
  const auto k = random_values(count(c.B * c.H * c.K), c.dtype, 2);
  const auto v = random_values(count(c.B * c.H * c.V), c.dtype, 3);
  const auto state = random_values(count(c.B * c.H * c.K * c.V), DType::kFloat32, 4);
  const auto wanted = reference::recurrent(
      {.shape = {.batch = c.B, .tokens = 1, .heads = c.H, .key_dim = c.K, .value_dim = c.V},
       .q_BTHK = q,
       .k_BTHK = k,
       .v_BTHV = v,
       .slope_H = c.slope,
       .scale = 0.5,
       .state_NHKV = c.initial ? std::span<const double>(state) : std::span<const double>()});
  ASSERT_TRUE(wanted.ok()) << wanted.status().message();

  const std::int64_t packed = 2 * c.K + c.V;
  std::vector<double> qkv(count(c.B * c.H * packed));
  for (std::int64_t row = 0; row < c.B * c.H; ++row) {
    std::copy_n(&q[count(row * c.K)], c.K, &qkv[count(row * packed)]);
    std::copy_n(&k[count(row * c.K)], c.K, &qkv[count(row * packed + c.K)]);
    std::copy_n(&v[count(row * c.V)], c.V, &qkv[count(row * packed + 2 * c.K)]);
  }
  const Sizes state_sizes = {c.B, c.H, c.K, c.V};
  Memory qkv_memory(qkv.size() * size_of(c.dtype)), o_memory(v.size() * size_of(c.dtype));
  Memory in_memory(state.size() * 4), out_memory(state.size() * 4);
  write_values(qkv_memory, c.dtype, qkv);
  write_values(in_memory, DType::kFloat32, state);
  const auto part = [&](std::int64_t at, std::int64_t dim) {
    return ConstTensorView{
        static_cast<const char*>(qkv_memory.data()) + count(at) * size_of(c.dtype),
        c.dtype,
        {c.B, 1, c.H, dim},
        {c.H * packed, -7, packed, 1}};
  };
  CudaStep call;
  call.q_B1HK = part(0, c.K);
  call.k_B1HK = part(c.K, c.K);
  call.v_B1HV = part(2 * c.K, c.V);
  const Sizes o_sizes = {c.B, 1, c.H, c.V};
  call.o_B1HV = {o_memory.data(), c.dtype, o_sizes, dense_strides(o_sizes)};
  if (c.initial)
    call.state_in_NHKV = {in_memory.data(), DType::kFloat32, state_sizes,
                          dense_strides(state_sizes)};
  call.state_out_NHKV = {c.in_place ? in_memory.data() : out_memory.data(), DType::kFloat32,
                         state_sizes, dense_strides(state_sizes)};
  call.slope_H = c.slope;
  call.scale = 0.5;
  const Status status = cuda_step(call, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_LT(relative_error(read_values(o_memory, c.dtype), wanted->o_BTHV), tolerance(c.dtype));
  EXPECT_LT(relative_error(read_values(c.in_place ? in_memory : out_memory, DType::kFloat32),
                           wanted->state_NHKV),
            1e-6);
}

using LightningCuda = OnGpu;

TEST_F(LightningCuda, StepIsTheRecurrenceForAllDimsAndDtypes) {
  const std::pair<int, int> dims[] = {{16, 16},   {32, 64},   {64, 64},   {96, 96},
                                      {128, 128}, {256, 128}, {128, 256}, {48, 80},
                                      {300, 20},  {17, 23},   {1, 1},     {64, 33}};
  for (const auto& [K, V] : dims)
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      expect_step_right({.K = K, .V = V, .dtype = dtype});
}

TEST_F(LightningCuda, StepUpdatesInPlaceAndStartsFromNothing) {
  for (const int dim : {64, 128, 17}) {
    expect_step_right({.K = dim, .V = dim, .in_place = true});
    expect_step_right({.K = dim, .V = dim, .initial = false});
  }
}

TEST_F(LightningCuda, StepTakesSlopesFromNothingToEverything) {
  expect_step_right({.slope = {80, 4e-8, 1e-5, 0.917}});
}

// A per-token factor exp(-4e-8) in fp32 would be wrong by half.
TEST_F(LightningCuda, ManyStepsDriftLittle) {
  constexpr std::int64_t kSteps = 1 << 18, kDim = 16, kHeads = 2;
  const std::vector<double> slope = {4e-8, 1e-4};
  const auto k = random_values(kSteps * kHeads * kDim, DType::kFloat32, 5);
  const auto v = random_values(kSteps * kHeads * kDim, DType::kFloat32, 6);
  const auto initial = random_values(kHeads * kDim * kDim, DType::kFloat32, 7);
  auto state = initial;
  const double lost[] = {std::expm1(-slope[0]), std::expm1(-slope[1])};
  for (std::size_t row = 0; row < kSteps * kHeads; ++row)
    for (std::size_t i = 0; i < kDim; ++i)
      for (std::size_t j = 0; j < kDim; ++j) {
        double& s = state[(row % kHeads * kDim + i) * kDim + j];
        s += s * lost[row % kHeads] + k[row * kDim + i] * v[row * kDim + j];
      }

  Memory k_memory(k.size() * 4), v_memory(v.size() * 4), o_memory(kHeads * kDim * 4),
      s_memory(state.size() * 4);
  write_values(k_memory, DType::kFloat32, k);
  write_values(v_memory, DType::kFloat32, v);
  write_values(s_memory, DType::kFloat32, initial);
  const Sizes sizes = {1, 1, kHeads, kDim}, state_sizes = {1, kHeads, kDim, kDim};
  CudaStep call;
  call.o_B1HV = {o_memory.data(), DType::kFloat32, sizes, dense_strides(sizes)};
  call.state_out_NHKV = {s_memory.data(), DType::kFloat32, state_sizes, dense_strides(state_sizes)};
  call.state_in_NHKV = call.state_out_NHKV;
  call.slope_H = slope;
  for (std::int64_t t = 0; t < kSteps; ++t) {
    const auto row = [&](const Memory& memory) {
      return ConstTensorView{static_cast<const float*>(memory.data()) + t * kHeads * kDim,
                             DType::kFloat32, sizes, dense_strides(sizes)};
    };
    call.q_B1HK = call.k_B1HK = row(k_memory);
    call.v_B1HV = row(v_memory);
    ASSERT_TRUE(cuda_step(call, nullptr).ok());
  }
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_LT(relative_error(read_values(s_memory, DType::kFloat32), state), 2e-5);
}

// What a graph captured gives is what direct calls give.
TEST_F(LightningCuda, StepCanBeCapturedInAGraph) {
  constexpr std::int64_t kDim = 64;
  const std::vector<double> slope = {0.1};
  const Sizes sizes = {1, 1, 1, kDim}, state_sizes = {1, 1, kDim, kDim};
  Memory x_memory(kDim * 4), o_memory(kDim * 4), direct(kDim * kDim * 4), replayed(kDim * kDim * 4);
  write_values(x_memory, DType::kFloat32, random_values(kDim, DType::kFloat32, 5));
  const auto initial = random_values(kDim * kDim, DType::kFloat32, 6);
  write_values(direct, DType::kFloat32, initial);
  write_values(replayed, DType::kFloat32, initial);
  CudaStep call;
  call.q_B1HK = call.k_B1HK =
      call.v_B1HV = {x_memory.data(), DType::kFloat32, sizes, dense_strides(sizes)};
  call.o_B1HV = {o_memory.data(), DType::kFloat32, sizes, dense_strides(sizes)};
  call.slope_H = slope;
  const auto step = [&](const Memory& state, cudaStream_t stream) {
    call.state_out_NHKV = {state.data(), DType::kFloat32, state_sizes, dense_strides(state_sizes)};
    call.state_in_NHKV = call.state_out_NHKV;
    ASSERT_TRUE(cuda_step(call, stream).ok());
  };
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t program = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  step(replayed, stream);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&program, graph, 0), cudaSuccess);
  for (int i = 0; i < 3; ++i) {
    step(direct, stream);
    ASSERT_EQ(cudaGraphLaunch(program, stream), cudaSuccess);
  }
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(direct.read(), replayed.read());
  (void)cudaGraphExecDestroy(program);
  (void)cudaGraphDestroy(graph);
  (void)cudaStreamDestroy(stream);
}

// Sequences find their states by slot; an empty place leaves a zero output and touches nothing.
TEST_F(LightningCuda, SlotsPickTheStatesAndEmptyPlacesAreLeftAlone) {
  constexpr std::int64_t kB = 3, kN = 5, kH = 2, kDim = 64;
  const std::vector<std::int64_t> slots = {4, -1, 1};
  const std::vector<double> slope = {0.3, 0.01};
  const auto x = random_values(kB * kH * kDim, DType::kFloat32, 8);
  const auto state = random_values(kN * kH * kDim * kDim, DType::kFloat32, 9);
  auto wanted_state = state;
  std::vector<double> wanted_o(x.size(), 0.0);
  for (std::size_t b = 0; b < kB; ++b)
    for (std::size_t h = 0; slots[b] >= 0 && h < kH; ++h)
      for (std::size_t i = 0; i < kDim; ++i)
        for (std::size_t j = 0; j < kDim; ++j) {
          const std::size_t at = (b * kH + h) * kDim;
          double& s =
              wanted_state[((static_cast<std::size_t>(slots[b]) * kH + h) * kDim + i) * kDim + j];
          s = s * std::exp(-slope[h]) + x[at + i] * x[at + j];
          wanted_o[at + j] += x[at + i] * s;
        }
  Memory x_memory(x.size() * 4), o_memory(x.size() * 4), s_memory(state.size() * 4),
      slot_memory(slots.size() * 8);
  write_values(x_memory, DType::kFloat32, x);
  write_values(s_memory, DType::kFloat32, state);
  slot_memory.write(slots.data());
  const Sizes sizes = {kB, 1, kH, kDim}, state_sizes = {kN, kH, kDim, kDim};
  CudaStep call;
  call.q_B1HK = call.k_B1HK =
      call.v_B1HV = {x_memory.data(), DType::kFloat32, sizes, dense_strides(sizes)};
  call.o_B1HV = {o_memory.data(), DType::kFloat32, sizes, dense_strides(sizes)};
  call.state_out_NHKV = {s_memory.data(), DType::kFloat32, state_sizes, dense_strides(state_sizes)};
  call.state_in_NHKV = call.state_out_NHKV;
  call.slot_B = static_cast<const std::int64_t*>(slot_memory.data());
  call.slope_H = slope;
  ASSERT_TRUE(cuda_step(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto o = read_values(o_memory, DType::kFloat32);
  EXPECT_LT(relative_error(o, wanted_o), 1e-6);
  EXPECT_TRUE(std::all_of(&o[kH * kDim], &o[2 * kH * kDim], [](double y) { return y == 0; }));
  EXPECT_LT(relative_error(read_values(s_memory, DType::kFloat32), wanted_state), 1e-6);
}

TEST(LightningCudaRefuses, AStepThatDoesNotFit) {  // before any work: needs no device
  const std::vector<double> slope = {0.1, 0.2};
  float memory[4] = {};
  const Sizes sizes = {1, 1, 2, 16}, state_sizes = {1, 2, 16, 16};
  CudaStep good;
  good.q_B1HK = good.k_B1HK = good.v_B1HV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.o_B1HV = {memory, DType::kFloat32, sizes, dense_strides(sizes)};
  good.state_out_NHKV = {memory, DType::kFloat32, state_sizes, dense_strides(state_sizes)};
  good.slope_H = slope;
  const auto expect_refused = [&](const char* what, auto change) {
    CudaStep call = good;
    change(call);
    EXPECT_FALSE(cuda_step(call, nullptr).ok()) << what;
  };
  expect_refused("two tokens", [](CudaStep& c) { c.q_B1HK.sizes[1] = 2; });
  expect_refused("fp64", [](CudaStep& c) { c.q_B1HK.dtype = DType::kFloat64; });
  expect_refused("mixed dtypes", [](CudaStep& c) { c.v_B1HV.dtype = DType::kBFloat16; });
  expect_refused("another K", [](CudaStep& c) { c.k_B1HK.sizes[3] = 8; });
  expect_refused("a column apart", [](CudaStep& c) { c.v_B1HV.strides[3] = 2; });
  expect_refused("a bf16 state", [](CudaStep& c) { c.state_out_NHKV.dtype = DType::kBFloat16; });
  expect_refused("too few states", [](CudaStep& c) { c.state_out_NHKV.sizes[0] = 0; });
  expect_refused("a slope too many", [](CudaStep& c) { c.slope_H = c.slope_H.first(1); });
  expect_refused("no output", [](CudaStep& c) { c.o_B1HV.data = nullptr; });
}

#endif

}  // namespace
}  // namespace everlong::lightning
