// The CPU kernel's threads, outputs, offsets, refusals, and a million steps, on the best
// instruction set.
#include <sys/mman.h>

#include "mechanisms/lightning/lightning_kernel_test.h"

namespace everlong::lightning {
namespace {

using namespace test;  // NOLINT: the fixtures of this file

// Also where threads are more than heads and columns are cut.
TEST(LightningKernelThreads, SameBitsForAnyNumber) {
  for (const Wanted& wanted :
       {Wanted{.tokens = 200, .key_dim = 96, .value_dim = 128, .slope = {0.01}},
        Wanted{.batch = 2, .tokens = 100, .key_dim = 64, .value_dim = 40, .slope = {0.5, 4e-8, 3}},
        Wanted{.key_dim = 72, .value_dim = 136, .slope = {0.1}, .offsets = {0, 5, 5, 170, 171}},
        Wanted{.tokens = 70, .key_dim = 128, .value_dim = 256, .dtype = DType::kBFloat16}}) {
    Case c(wanted);
    const Results one = run(c, SerialExecutor());
    for (const int threads : {2, 3, 4, 7, 16}) {
      const Results many = run(c, Threads(threads));
      for (const auto member : {&Results::o, &Results::state, &Results::grad_q, &Results::grad_k,
                                &Results::grad_v, &Results::grad_state})
        EXPECT_EQ((one.*member).bytes(), (many.*member).bytes()) << threads << " threads";
    }
  }
}

// A call says how many threads it keeps busy: the columns of one head are shared out.
TEST(LightningKernelThreads, OneHeadKeepsSeveralThreadsBusy) {
  class Counting final : public Executor {
   public:
    int threads() const override { return 4; }
    void run(std::int64_t tasks,
             const std::function<void(std::int64_t, int)>& task) const override {
      most = std::max(most, tasks);
      for (std::int64_t i = 0; i < tasks; ++i) task(i, static_cast<int>(i % 4));
    }
    mutable std::int64_t most = 0;
  };
  Case c({.tokens = 64, .key_dim = 128, .value_dim = 128, .slope = {0.01}});
  const Counting counting;
  run(c, counting);
  EXPECT_GE(counting.most, 4);
}

// Large aligned outputs are streamed past the caches; where memory is not aligned they are not.
TEST(LightningKernelOutputs, SameBitsStreamedOrNot) {
  Case c({.tokens = 4200, .key_dim = 16, .value_dim = 128, .slope = {0.02, 1e-4}});
  const std::size_t count = c.v.size();  // 4.3 MB
  auto workspace = poisoned_workspace(c, 1);
  std::vector<float> first(count + 32), second(count + 32);
  const auto at = [&](std::vector<float>& memory, std::size_t past) {
    const std::size_t off = reinterpret_cast<std::uintptr_t>(memory.data()) % 64 / sizeof(float);
    return memory.data() + (16 - off) + past;
  };
  float *aligned = at(first, 0), *shifted = at(second, 1);
  for (float* o : {aligned, shifted}) {
    auto args = c.args(c.tv, nullptr);
    args.o_BTHV = {o, DType::kFloat32, {1, 4200, 2, 128}, {0, 256, 128, 1}};
    ASSERT_TRUE(cpu::forward(args, workspace, SerialExecutor()).ok());
  }
  EXPECT_EQ(std::memcmp(aligned, shifted, count * sizeof(float)), 0);
  const Values o(aligned, aligned + count);
  EXPECT_LE(error(o, reference::chunked(c.input(), 64)->o_BTHV), kFloat32);
}

// T3: offsets of more than 2^31 elements. The memory is only reserved: four tokens are touched.
TEST(LightningKernelOffsets, TokensMayLieFarApart) {
  constexpr std::int64_t kApart = (std::int64_t{1} << 30) + 16, kTokens = 4, kDim = 16;
  constexpr std::size_t kBytes = static_cast<std::size_t>(kTokens * kApart) * sizeof(float);
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "16 GB of addresses are not to be had";
  Case c({.key_dim = kDim,
          .value_dim = kDim,
          .slope = {0.3},
          .offsets = {0, 3, kTokens},
          .state = false});
  auto* base = static_cast<float*>(memory);
  const auto far = [&](std::int64_t place) -> TensorView {
    return {base + place * kDim, DType::kFloat32, {1, kTokens, 1, kDim}, {0, kApart, kDim, 1}};
  };
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t i = 0; i < kDim; ++i) {
      const auto at = static_cast<std::size_t>(t * kDim + i);
      base[t * kApart + i] = static_cast<float>(c.q[at]);
      base[t * kApart + kDim + i] = static_cast<float>(c.k[at]);
      base[t * kApart + 2 * kDim + i] = static_cast<float>(c.v[at]);
    }
  auto workspace = poisoned_workspace(c, 1);
  const Status status = cpu::forward({.q_BTHK = far(0),
                                      .k_BTHK = far(1),
                                      .v_BTHV = far(2),
                                      .o_BTHV = far(3),
                                      .cu_seqlens = c.w.offsets,
                                      .slope = c.w.slope,
                                      .scale = c.w.scale},
                                     workspace, SerialExecutor());
  ASSERT_TRUE(status.ok()) << status.message();
  Values o;
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t i = 0; i < kDim; ++i) o.push_back(base[t * kApart + 3 * kDim + i]);
  EXPECT_LE(error(o, reference::parallel(c.input())->o_BTHV), kFloat32);
  munmap(memory, kBytes);
}

TEST(LightningKernelArguments, AreRefusedBeforeAnyWork) {
  Case c({.tokens = 5, .slope = {0.5, 0.1}});
  Tensor o = c.values(), state = c.states();
  auto workspace = poisoned_workspace(c, 1);
  const auto refused = [&](const char* what, const std::string& expected, const auto& spoil) {
    auto args = c.args(o, &state);
    std::span<std::byte> memory = workspace;
    spoil(args, memory);
    const Status status = cpu::forward(args, memory, SerialExecutor());
    EXPECT_FALSE(status.ok()) << what;
    EXPECT_NE(status.message().find(expected), std::string::npos) << status.message();
  };
  using Args = cpu::ForwardArgs;
  using Bytes = std::span<std::byte>;
  refused("fp16", "fp32 and bf16", [](Args& a, Bytes&) { a.q_BTHK.dtype = DType::kFloat16; });
  refused("mixed dtypes", "k is bf16", [](Args& a, Bytes&) { a.k_BTHK.dtype = DType::kBFloat16; });
  refused("a wide key", "up to 256", [](Args& a, Bytes&) { a.q_BTHK.sizes[3] = 264; });
  refused("other tokens", "v is", [](Args& a, Bytes&) { a.v_BTHV.sizes[1] = 4; });
  refused("a spread last dimension", "stride 2", [](Args& a, Bytes&) { a.k_BTHK.strides[3] = 2; });
  refused("no o", "o is absent", [](Args& a, Bytes&) { a.o_BTHV.data = nullptr; });
  refused("a bf16 state", "the state is bf16",
          [](Args& a, Bytes&) { a.state_NHKV.dtype = DType::kBFloat16; });
  refused("a state [V, K]", "the final state is",
          [](Args& a, Bytes&) { std::swap(a.state_out_NHKV.sizes[2], a.state_out_NHKV.sizes[3]); });
  refused("a small workspace", "workspace_bytes",
          [](Args&, Bytes& b) { b = b.first(b.size() - 1); });
  const Values negative = {0.5, -0.1};
  refused("a negative slope", "slope", [&](Args& a, Bytes&) { a.slope = negative; });
  const Offsets late = {1, 5};
  refused("offsets that start late", "lightning", [&](Args& a, Bytes&) { a.cu_seqlens = late; });
  const auto two_tokens = cpu::step(c.args(o, &state), SerialExecutor());
  EXPECT_NE(two_tokens.message().find("one token"), std::string::npos);
  EXPECT_TRUE(std::ranges::all_of(o.bytes(), [](char x) { return x == static_cast<char>(0xFF); }));
}

// A million single steps against the chunk form and against float64: fp32 has no factor for the
// smallest published slope, and bf16 no room for the update (spec, section 4 and P14).
TEST(LightningKernelDrift, AMillionStepsStayWithTheChunks) {
  constexpr std::int64_t kTokens = 1 << 20, kDim = 8;
  const Values slope = {4e-8, 1e-5, 3.9e-3, 0.917};
  const auto H = static_cast<std::int64_t>(slope.size());
  std::mt19937_64 generator(3);
  std::uniform_real_distribution<float> positive;  // a mean: sums grow as fast as they can
  std::vector<float> k(static_cast<std::size_t>(kTokens * H * kDim)), v(k.size()), o(k.size());
  for (auto* x : {&k, &v})
    for (float& value : *x) value = positive(generator);
  std::vector<float> steps(static_cast<std::size_t>(H * kDim * kDim)), chunks(steps.size());
  const auto tokens = [&](std::vector<float>& x, std::int64_t first, std::int64_t count) {
    return TensorView{
        x.data() + first * H * kDim, DType::kFloat32, {1, count, H, kDim}, {0, H * kDim, kDim, 1}};
  };
  const auto matrices = [&](std::vector<float>& x) {
    return TensorView{
        x.data(), DType::kFloat32, {1, H, kDim, kDim}, {H * kDim * kDim, kDim * kDim, kDim, 1}};
  };
  const auto args = [&](std::int64_t first, std::int64_t count, std::vector<float>& state) {
    return cpu::ForwardArgs{.q_BTHK = tokens(k, first, count),
                            .k_BTHK = tokens(k, first, count),
                            .v_BTHV = tokens(v, first, count),
                            .o_BTHV = tokens(o, first, count),
                            .state_NHKV = matrices(state),
                            .state_out_NHKV = matrices(state),
                            .slope = slope};
  };
  std::vector<std::byte> workspace(cpu::workspace_bytes(H, kDim, kDim, 1));
  ASSERT_TRUE(cpu::forward(args(0, kTokens, chunks), workspace, SerialExecutor()).ok());
  for (std::int64_t t = 0; t < kTokens; ++t)
    ASSERT_TRUE(cpu::step(args(t, 1, steps), SerialExecutor()).ok());

  for (std::int64_t h = 0; h < H; ++h) {
    const double kept = std::exp(-slope[static_cast<std::size_t>(h)]);
    Values exact(kDim * kDim), by_steps, by_chunks;
    for (std::int64_t t = 0; t < kTokens; ++t)
      for (std::int64_t i = 0; i < kDim; ++i)
        for (std::int64_t j = 0; j < kDim; ++j) {
          const auto row = static_cast<std::size_t>((t * H + h) * kDim);
          double& s = exact[static_cast<std::size_t>(i * kDim + j)];
          s = s * kept + static_cast<double>(k[row + static_cast<std::size_t>(i)]) *
                             static_cast<double>(v[row + static_cast<std::size_t>(j)]);
        }
    const auto at = static_cast<std::ptrdiff_t>(h * kDim * kDim);
    by_steps.assign(steps.begin() + at, steps.begin() + at + kDim * kDim);
    by_chunks.assign(chunks.begin() + at, chunks.begin() + at + kDim * kDim);
    RecordProperty(cat("steps_", h), cat(error(by_steps, exact)));
    RecordProperty(cat("chunks_", h), cat(error(by_chunks, exact)));
    EXPECT_LE(error(by_steps, by_chunks), 1e-4) << "slope " << slope[static_cast<std::size_t>(h)];
    EXPECT_LE(error(by_steps, exact), 1e-4) << "slope " << slope[static_cast<std::size_t>(h)];
    EXPECT_LE(error(by_chunks, exact), 2e-5) << "slope " << slope[static_cast<std::size_t>(h)];
  }
}

}  // namespace
}  // namespace everlong::lightning
