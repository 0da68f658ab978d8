// The CPU kernel as the operator takes it: which path ran, and gradients through torch. What it
// computes is lightning_kernel_test's business, and the laws hold form "cpu" to everything else.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <atomic>

#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/op_cpu.h"
#include "ops/parallel.h"
#include "support/compare.h"

namespace everlong::lightning {
namespace {

using test::relative_error;
using test::same_bits;

class LightningCpu : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(5); }
  static at::Tensor draw(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
    return at::randn(sizes).to(dtype);
  }
};

TEST_F(LightningCpu, PathIsTheKernelWhereItApplies) {
  const auto path = [](at::ScalarType dtype, std::int64_t dim, Path wanted = Path::kAuto) {
    const at::Tensor x = at::zeros({1, 4, 2, dim}, dtype);
    return path_taken(x, x, x, wanted);
  };
  EXPECT_EQ(path(at::kFloat, 64), "cpu");
  EXPECT_EQ(path(at::kBFloat16, 24), "cpu");
  EXPECT_EQ(path(at::kFloat, 256), "cpu");
  EXPECT_EQ(path(at::kFloat, 257), "composite");
  EXPECT_EQ(path(at::kDouble, 64), "composite");
  EXPECT_EQ(path(at::kHalf, 64), "composite");
  EXPECT_EQ(path(at::kFloat, 64, Path::kComposite), "composite");
  EXPECT_THROW(path(at::kDouble, 64, Path::kCpu), c10::Error);
}

// The two paths differ by rounding, so equal bits tell which one ran.
TEST_F(LightningCpu, PathTakenIsThePathThatRuns) {
  const at::NoGradGuard no_grad;
  const Decay decay({0.1, 1e-3}, 0.5);
  for (const std::int64_t tokens : {1, 200}) {
    const at::Tensor q = draw({2, tokens, 2, 64}), k = draw({2, tokens, 2, 64}),
                     v = draw({2, tokens, 2, 64}), S = draw({2, 2, 64, 64});
    const auto run = [&](Path path) {
      return decay_linear_attention(q, k, v, decay, {}, S, path).o_BTHV;
    };
    EXPECT_TRUE(same_bits(run(Path::kAuto), run(Path::kCpu))) << tokens;
    EXPECT_FALSE(same_bits(run(Path::kAuto), run(Path::kComposite))) << tokens;
    EXPECT_LE(relative_error(run(Path::kAuto), run(Path::kComposite)),
              tolerance::floor_of(at::kFloat));
  }
}

TEST_F(LightningCpu, ReadsAndWritesWhatWasAskedOnly) {
  const at::NoGradGuard no_grad;
  const Decay decay({0.1, 1e-3}, 1.0);
  const at::Tensor S = draw({1, 2, 8, 8}), before = S.clone();
  for (const std::int64_t tokens : {1, 40}) {
    const at::Tensor x = draw({1, tokens, 2, 8});
    const auto result = decay_linear_attention(x, x, x, decay, {}, S);
    EXPECT_TRUE(same_bits(S, before)) << "the state of the caller is not the kernel's to change";
    EXPECT_FALSE(result.state_NHKV.is_alias_of(S));
  }
}

// Every subset of inputs that want gradients, with and without a state, from o or the state alone.
TEST_F(LightningCpu, GradientsOfAnySubsetEqualTheCompositeForms) {
  const Decay decay({0.3, 1e-3}, 0.7);
  for (const std::int64_t tokens : {1, 70})
    for (int subset = 1; subset < 16; ++subset)
      for (const bool from_state : {false, true}) {
        const auto leaf = [&](int bit, at::IntArrayRef sizes) {
          return draw(sizes).set_requires_grad((subset >> bit & 1) != 0);
        };
        const at::Tensor q = leaf(0, {2, tokens, 2, 24}), k = leaf(1, {2, tokens, 2, 24}),
                         v = leaf(2, {2, tokens, 2, 16}), S = leaf(3, {2, 2, 24, 16});
        const bool with_state = (subset & 8) != 0;
        if (from_state && (subset & 14) == 0) continue;  // the final state does not depend on q
        const auto gradients = [&](Path path) {
          const auto result = decay_linear_attention(
              q, k, v, decay, {}, with_state ? std::optional(S) : std::nullopt, path);
          std::vector<at::Tensor> wanted;
          for (const at::Tensor& x : {q, k, v, S})
            if (x.requires_grad()) wanted.push_back(x);
          const at::Tensor sum =
              from_state ? result.state_NHKV.sum() : (result.o_BTHV * result.o_BTHV).sum();
          return torch::autograd::grad({sum}, wanted, {}, std::nullopt, false,
                                       /*allow_unused=*/true);
        };
        const auto actual = gradients(Path::kCpu), expected = gradients(Path::kComposite);
        ASSERT_EQ(actual.size(), expected.size());
        for (std::size_t i = 0; i < actual.size(); ++i) {
          const at::Tensor reference =
              expected[i].defined() ? expected[i] : at::zeros_like(actual[i]);
          EXPECT_LE(relative_error(actual[i], reference), 1e-5)
              << "subset " << subset << ", gradient " << i << ", " << tokens << " tokens"
              << (from_state ? " from the state" : "");
        }
      }
}

// Trap: without -fopenmp torch's parallel_for runs on one thread, silently.
TEST_F(LightningCpu, UsesTheThreadsThatTorchHas) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  std::array<std::atomic<int>, 2> calls{};
  torch_executor().run(
      2, [&](std::int64_t, int thread) { ++calls[static_cast<std::size_t>(thread)]; });
  EXPECT_EQ(torch_executor().threads(), 2);
  EXPECT_EQ(calls[0].load(), 1);
  EXPECT_EQ(calls[1].load(), 1);
  at::set_num_threads(before);
}

}  // namespace
}  // namespace everlong::lightning
