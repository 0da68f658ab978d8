#include "layers/experts.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "layers/weights.h"

namespace everlong {
namespace {

constexpr std::int64_t kWidth = 6, kInner = 10, kExperts = 5, kPerToken = 2;

std::shared_ptr<GatedMlp> make(std::int64_t experts = kExperts,
                               std::int64_t per_token = kPerToken) {
  at::manual_seed(3);
  auto made = make_experts(kWidth, kInner, experts, per_token, 4).value();
  made->to(at::kDouble);
  return made;
}

at::Tensor weight(const torch::nn::Module& module, const std::string& name) {
  return *module.named_parameters().find(name);
}

at::Tensor expert(const torch::nn::Module& module, std::int64_t e, const at::Tensor& x_D) {
  const std::string place = cat("experts.", e, ".");
  return at::mv(weight(module, place + "w2.weight"),
                at::silu(at::mv(weight(module, place + "w1.weight"), x_D)) *
                    at::mv(weight(module, place + "w3.weight"), x_D));
}

// The definition, one token after the other.
at::Tensor token_by_token(const torch::nn::Module& module, const at::Tensor& x_ND,
                          std::int64_t per_token) {
  std::vector<at::Tensor> rows;
  for (std::int64_t n = 0; n < x_ND.size(0); ++n) {
    const at::Tensor p = at::softmax(at::mv(weight(module, "gate.weight"), x_ND[n]), 0);
    std::vector<std::int64_t> order(static_cast<std::size_t>(p.numel()));
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](std::int64_t a, std::int64_t b) {
      return p[a].item<double>() > p[b].item<double>();
    });
    at::Tensor sum, y;
    for (std::int64_t i = 0; i < per_token; ++i) {
      const std::int64_t e = order[static_cast<std::size_t>(i)];
      const at::Tensor term = p[e] * expert(module, e, x_ND[n]);
      sum = i == 0 ? p[e] : sum + p[e];
      y = i == 0 ? term : y + term;
    }
    rows.push_back(y / sum);
  }
  return at::stack(rows);
}

TEST(Experts, EachTokenIsTheRenormalisedSumOfItsLikeliestExperts) {
  for (const std::int64_t per_token : {1, 2, 3, 5}) {
    const auto experts = make(kExperts, per_token);
    const at::Tensor x = at::randn({3, 7, kWidth}, at::kDouble);
    const at::Tensor want = token_by_token(*experts, x.flatten(0, 1), per_token).view_as(x);
    EXPECT_TRUE(at::allclose(experts->forward(x), want, 1e-11, 1e-12)) << per_token;
  }
}

TEST(Experts, GradientsAreThoseOfTheDefinition) {
  const auto experts = make();
  const at::Tensor data = at::randn({11, kWidth}, at::kDouble);
  const at::Tensor direction = at::randn({11, kWidth}, at::kDouble);
  const auto differentiate = [&](bool definition) {
    const at::Tensor x = data.clone().set_requires_grad(true);
    experts->zero_grad();
    const at::Tensor y = definition ? token_by_token(*experts, x, kPerToken) : experts->forward(x);
    (y * direction).sum().backward();
    std::vector<at::Tensor> gradients = {x.grad()};
    for (const auto& item : experts->named_parameters()) gradients.push_back(item.value().grad());
    return gradients;
  };
  const auto want = differentiate(true), got = differentiate(false);
  for (std::size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(want[i].defined(), got[i].defined()) << i;
    if (want[i].defined()) {
      EXPECT_TRUE(at::allclose(got[i], want[i], 1e-10, 1e-11)) << i;
    }
  }
}

TEST(Experts, ATokenDoesNotDependOnThoseBesideIt) {
  const auto experts = make();
  const at::Tensor x = at::randn({9, kWidth}, at::kDouble), whole = experts->forward(x);
  for (std::int64_t n = 0; n < 9; ++n)
    EXPECT_TRUE(
        at::allclose(experts->forward(x.narrow(0, n, 1)), whole.narrow(0, n, 1), 1e-12, 1e-13));
  EXPECT_EQ(experts->forward(x.narrow(0, 0, 0)).sizes(), (std::vector<std::int64_t>{0, kWidth}));
}

TEST(Experts, OfEqualProbabilitiesTheLowerExpertComesFirst) {
  const auto experts = make();
  {
    at::NoGradGuard off;
    weight(*experts, "gate.weight").zero_();
  }
  const at::Tensor x = at::randn({4, kWidth}, at::kDouble);
  for (std::int64_t n = 0; n < 4; ++n) {
    const at::Tensor want = (expert(*experts, 0, x[n]) + expert(*experts, 1, x[n])) / 2;
    EXPECT_TRUE(at::allclose(experts->forward(x)[n], want, 1e-12, 1e-13));
  }
}

TEST(Experts, AnExpertWithoutTokensGetsNoGradient) {
  const auto experts = make();
  {
    at::NoGradGuard off;
    weight(*experts, "gate.weight").zero_();
  }
  experts->forward(at::randn({4, kWidth}, at::kDouble)).sum().backward();
  EXPECT_TRUE(weight(*experts, "experts.1.w2.weight").grad().defined());
  EXPECT_FALSE(weight(*experts, "experts.2.w2.weight").grad().defined());
}

// Probabilities that differ by less than bf16 resolves still choose as fp32 does.
TEST(Experts, LowPrecisionRoutesInFp32) {
  const auto experts = make(2, 1);
  experts->to(at::kBFloat16);
  {
    at::NoGradGuard off;
    at::Tensor gate = weight(*experts, "gate.weight");
    gate.zero_();
    gate[0].fill_(1);
    gate[1].fill_(1);
    gate[1][kWidth - 1] = 1.0078125;  // the next number of bf16
  }
  // Logits 1000 + 0.001 (or less): one and the same in bf16, whose numbers there are 4 apart.
  at::Tensor x = at::zeros({1, kWidth}, at::kBFloat16);
  x[0][0] = 1000;
  x[0][kWidth - 1] = 0.125;
  const at::Tensor y = experts->forward(x);
  const at::Tensor second = expert(*experts, 1, x[0]), first = expert(*experts, 0, x[0]);
  const auto distance = [&](const at::Tensor& to) {
    return (y[0] - to).to(at::kFloat).abs().max().item<float>();
  };
  EXPECT_LT(distance(second), 0.02F * second.to(at::kFloat).abs().max().item<float>());
  EXPECT_GT(distance(first), distance(second));
}

TEST(Experts, RefusesCountsThatDoNotFit) {
  EXPECT_FALSE(make_experts(4, 4, 0, 1, 1).ok());
  EXPECT_FALSE(make_experts(4, 4, 2, 3, 1).ok());
  EXPECT_FALSE(make_experts(4, 4, 2, 0, 1).ok());
}

TEST(Experts, HasThePublishedNames) {
  const auto names = make(2, 1)->named_parameters().keys();
  EXPECT_EQ(names,
            (std::vector<std::string>{"gate.weight", "experts.0.w1.weight", "experts.0.w3.weight",
                                      "experts.0.w2.weight", "experts.1.w1.weight",
                                      "experts.1.w3.weight", "experts.1.w2.weight"}));
}

}  // namespace
}  // namespace everlong
