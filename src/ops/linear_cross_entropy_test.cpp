#include "ops/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace everlong {
namespace {

struct Case {
  at::Tensor hidden, weight, targets;
};

Case random_case(std::int64_t tokens, std::int64_t width, std::int64_t vocabulary,
                 at::ScalarType dtype) {
  at::manual_seed(static_cast<std::uint64_t>(tokens));
  Case c{at::randn({tokens, width}, at::kDouble).to(dtype),
         at::randn({vocabulary, width}, at::kDouble).to(dtype),
         at::randint(vocabulary, {tokens}, at::kLong)};
  if (tokens > 4) {
    c.targets[0] = kIgnoredTarget;  // at an edge, beside another, and alone
    c.targets[1] = kIgnoredTarget;
    c.targets[tokens / 2] = kIgnoredTarget;
    c.targets[2] = vocabulary - 1;
  }
  c.hidden.requires_grad_(true);
  c.weight.requires_grad_(true);
  return c;
}

at::Tensor direct_per_token(const Case& c) {
  const at::Tensor scores = at::log_softmax(at::matmul(c.hidden, c.weight.t()), -1);
  const at::Tensor counted = c.targets != kIgnoredTarget;
  const at::Tensor picked = scores.gather(1, c.targets.clamp_min(0).unsqueeze(1)).squeeze(1);
  return -at::where(counted, picked, at::zeros_like(picked));
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

TEST(LinearCrossEntropy, EqualsLogSoftmaxWhateverTheChunk) {
  for (const std::int64_t chunk : {0, 1, 7, 16, 100}) {
    const Case c = random_case(33, 12, 19, at::kDouble);
    const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets, chunk);
    const at::Tensor want = direct_per_token(c);
    EXPECT_LT(largest(got.nll_N - want), 1e-13);
    EXPECT_LT(largest(got.nll_sum - want.sum()), 1e-12);
    EXPECT_FALSE(got.nll_N.requires_grad());
    // A scale that differs from 1, as accumulation and averaging give it.
    const auto gradients = torch::autograd::grad({got.nll_sum * 0.37}, {c.hidden, c.weight});
    const auto expected = torch::autograd::grad({want.sum() * 0.37}, {c.hidden, c.weight});
    for (std::size_t i = 0; i < 2; ++i) EXPECT_LT(largest(gradients[i] - expected[i]), 1e-12) << i;
  }
}

TEST(LinearCrossEntropy, WeightsScaleEachTokensLossAndGradient) {
  for (const std::int64_t chunk : {0, 1, 7, 100}) {
    const Case c = random_case(33, 12, 19, at::kDouble);
    at::Tensor weights = at::rand({33}, at::kFloat);
    weights[5] = 0;
    const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets, chunk, weights);
    const at::Tensor want = direct_per_token(c);
    const at::Tensor sum = (want * weights.to(at::kDouble)).sum();
    EXPECT_LT(largest(got.nll_N - want), 1e-13);  // as without weights
    EXPECT_LT(largest(got.nll_sum - sum), 1e-12);
    const auto gradients = torch::autograd::grad({got.nll_sum * 0.37}, {c.hidden, c.weight});
    const auto expected = torch::autograd::grad({sum * 0.37}, {c.hidden, c.weight});
    for (std::size_t i = 0; i < 2; ++i) EXPECT_LT(largest(gradients[i] - expected[i]), 1e-12) << i;
    EXPECT_EQ(largest(gradients[0][5]), 0);
  }
  const Case c = random_case(6, 4, 5, at::kFloat);
  for (const at::Tensor& wrong : {at::ones({5}), at::ones({6}, at::kDouble), at::ones({6, 1})})
    EXPECT_THROW(linear_cross_entropy(c.hidden, c.weight, c.targets, 0, wrong), c10::Error);
}

TEST(LinearCrossEntropy, ChunksByItselfAtLargeVocabularies) {
  const Case c = random_case(40, 4, 300000, at::kFloat);  // 13 tokens a chunk
  const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets);
  EXPECT_LT(largest(got.nll_N - direct_per_token(c)), 1e-4);
}

TEST(LinearCrossEntropy, NoTokensCostNothing) {
  const Case c = random_case(0, 12, 19, at::kFloat);
  const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets);
  EXPECT_EQ(got.nll_sum.item<double>(), 0);
  EXPECT_EQ(got.nll_N.numel(), 0);
  const auto gradients = torch::autograd::grad({got.nll_sum}, {c.hidden, c.weight});
  EXPECT_EQ(gradients[0].sizes(), c.hidden.sizes());
  EXPECT_EQ(largest(gradients[1]), 0);
}

TEST(LinearCrossEntropy, AllIgnoredGivesZeroLossAndGradient) {
  Case c = random_case(9, 6, 11, at::kFloat);
  c.targets.fill_(kIgnoredTarget);
  const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets);
  EXPECT_EQ(got.nll_sum.item<double>(), 0);
  const auto gradients = torch::autograd::grad({got.nll_sum}, {c.hidden, c.weight});
  EXPECT_EQ(largest(gradients[0]) + largest(gradients[1]), 0);
}

TEST(LinearCrossEntropy, LowPrecisionAccumulatesTheWeightGradientInFp32) {
  // 4096 tokens in 64 chunks: a bf16 accumulator would stop growing when a chunk's share falls
  // below 2^-8 of the sum.
  const Case c = random_case(4096, 8, 5, at::kBFloat16);
  const auto got = linear_cross_entropy(c.hidden, c.weight, c.targets, 64);
  Case wide{c.hidden.detach().to(at::kDouble).requires_grad_(true),
            c.weight.detach().to(at::kDouble).requires_grad_(true), c.targets};
  const at::Tensor want = direct_per_token(wide);
  EXPECT_EQ(got.nll_N.scalar_type(), at::kFloat);
  EXPECT_LT(largest(got.nll_N - want), 1e-4);  // fp32 logits of bf16 operands
  const auto gradients = torch::autograd::grad({got.nll_sum}, {c.hidden, c.weight});
  const auto expected = torch::autograd::grad({want.sum()}, {wide.hidden, wide.weight});
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(gradients[i].scalar_type(), at::kBFloat16);
    EXPECT_LT(largest(gradients[i].to(at::kDouble) - expected[i]), 0x1p-8 * largest(expected[i]))
        << i;
  }
}

TEST(LinearCrossEntropy, RefusesShapesThatDoNotFit) {
  const Case c = random_case(6, 4, 5, at::kFloat);
  EXPECT_ANY_THROW(linear_cross_entropy(c.hidden, c.weight.narrow(1, 0, 3), c.targets));
  EXPECT_ANY_THROW(linear_cross_entropy(c.hidden, c.weight, c.targets.narrow(0, 0, 5)));
  EXPECT_ANY_THROW(linear_cross_entropy(c.hidden, c.weight, c.targets.to(at::kInt)));
}

}  // namespace
}  // namespace everlong
