#include "train/adamw.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace everlong {
namespace {

// fp64 against fp64, the same formula in another order of operations.
constexpr double kFp64 = 1e-13;

at::Tensor parameter(at::IntArrayRef shape, at::ScalarType dtype = at::kDouble) {
  return at::randn(shape, at::kDouble).to(dtype).set_requires_grad(true);
}

void expect_close(const at::Tensor& a, const at::Tensor& b, double tolerance) {
  EXPECT_LE((a.detach().to(at::kDouble) - b.detach().to(at::kDouble)).abs().max().item<double>(),
            tolerance);
}

// Layers keep what they derived from a parameter as long as its version is the same.
TEST(AdamW, UpdateIsANewVersionOfTheParameter) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    at::Tensor weight = parameter({3, 4}, dtype);
    AdamW adamw({{"weight", weight}}, {});
    weight.mutable_grad() = at::ones_like(weight);
    adamw.take_gradients();
    const auto before = weight._version();
    adamw.step(0.1);
    EXPECT_GT(weight._version(), before) << dtype;
  }
}

TEST(AdamW, FollowsTheTextbookFormula) {
  at::manual_seed(1);
  const AdamWOptions options{.beta1 = 0.8, .beta2 = 0.97, .eps = 1e-6, .weight_decay = 0.3};
  at::Tensor matrix = parameter({5, 7}), vector = parameter({11});
  at::Tensor p[2] = {matrix.detach().clone(), vector.detach().clone()};
  at::Tensor m[2] = {at::zeros_like(p[0]), at::zeros_like(p[1])},
             v[2] = {at::zeros_like(p[0]), at::zeros_like(p[1])};
  AdamW adamw({{"matrix", matrix}, {"vector", vector}}, options);
  for (int t = 1; t <= 5; ++t) {
    const double lr = 0.01 * t;
    for (int i = 0; i < 2; ++i) {
      const at::Tensor g = at::randn_like(p[i]);
      (i == 0 ? matrix : vector).mutable_grad() = g.clone();
      m[i] = options.beta1 * m[i] + (1 - options.beta1) * g;
      v[i] = options.beta2 * v[i] + (1 - options.beta2) * g * g;
      const double decay = i == 0 ? options.weight_decay : 0;  // one dimension: no decay
      p[i] = p[i] - lr * decay * p[i] -
             lr * (m[i] / (1 - std::pow(options.beta1, t))) /
                 ((v[i] / (1 - std::pow(options.beta2, t))).sqrt() + options.eps);
    }
    adamw.take_gradients();
    EXPECT_FALSE(matrix.grad().defined());
    adamw.step(lr);
    expect_close(matrix, p[0], kFp64);
    expect_close(vector, p[1], kFp64);
  }
}

TEST(AdamW, NamedParametersMoveAtARateOfTheirOwn) {
  const auto one = [] { return at::ones({1}, at::kDouble).set_requires_grad(true); };
  at::Tensor gate = one(), other = one();
  AdamW adamw({{"layers.0.self_attn.gate", gate}, {"layers.0.self_attn.gate_norm", other}},
              {.rate_factors = {{".self_attn.gate", 30}}});
  for (const at::Tensor& x : {gate, other}) x.mutable_grad() = at::ones({1}, at::kDouble);
  adamw.take_gradients();
  adamw.step(1e-3);  // the first step of Adam is the rate, whatever the gradient
  EXPECT_NEAR(1 - gate.item<double>(), 3e-2, 1e-8);
  EXPECT_NEAR(1 - other.item<double>(), 1e-3, 1e-9);
}

TEST(AdamW, UpdatesBelowBf16SpacingAreNotLost) {
  at::Tensor p = at::ones({1, 4}, at::kBFloat16).set_requires_grad(true);  // spacing below 1: 2^-8
  AdamW adamw({{"p", p}}, {.weight_decay = 0});
  constexpr int kSteps = 100;
  constexpr double kRate = 1e-4;  // Adam's step for a constant gradient: 1/39 of the spacing
  for (int t = 0; t < kSteps; ++t) {
    p.mutable_grad() = at::ones_like(p).detach();
    adamw.take_gradients();
    adamw.step(kRate);
  }
  // 1 - 100 * 1e-4 = 0.99, rounded to bf16's grid of 2^-8 = 0.0039.
  expect_close(p, at::full({1, 4}, 0.99), 0.002);
  EXPECT_EQ(p.scalar_type(), at::kBFloat16);
}

TEST(AdamW, SumsOfBf16GradientsAreFp32) {
  at::Tensor p = at::zeros({1, 1}, at::kBFloat16).set_requires_grad(true);
  AdamW adamw({{"p", p}}, {});
  for (const double g : {256.0, 1.0, 1.0}) {  // bf16 has 8 bits: 256 + 1 = 256 there
    p.mutable_grad() = at::full_like(p, g).detach();
    adamw.take_gradients();
  }
  EXPECT_EQ(adamw.gradients().at("p").item<double>(), 258.0);
}

TEST(AdamW, ClipsTheGlobalNormAndReportsItUnclipped) {
  at::Tensor a = parameter({2, 2}), b = parameter({3});
  AdamW adamw({{"a", a}, {"b", b}}, {});
  const auto give = [&](double scale) {
    adamw.clear_gradients();
    a.mutable_grad() = at::full({2, 2}, 2 * scale, at::kDouble);
    b.mutable_grad() = at::tensor({3 * scale, 0.0, 0.0}, at::kDouble);
    adamw.take_gradients();
  };
  give(1);  // norm sqrt(4*4 + 9) = 5
  EXPECT_NEAR(adamw.clip_gradients(0.5).item<double>(), 5.0, kFp64);
  EXPECT_NEAR(adamw.gradients().at("a")[0][0].item<double>(), 0.2, kFp64);
  EXPECT_NEAR(adamw.gradients().at("b")[0].item<double>(), 0.3, kFp64);
  give(0.01);  // below the limit: untouched
  EXPECT_NEAR(adamw.clip_gradients(0.5).item<double>(), 0.05, kFp64);
  EXPECT_NEAR(adamw.gradients().at("a")[0][0].item<double>(), 0.02, kFp64);
  give(1);  // 0: only measured
  EXPECT_NEAR(adamw.clip_gradients(0).item<double>(), 5.0, kFp64);
  EXPECT_NEAR(adamw.gradients().at("a")[0][0].item<double>(), 2.0, kFp64);
  give(NAN);
  EXPECT_FALSE(std::isfinite(adamw.clip_gradients(1).item<double>()));
}

TEST(AdamW, AParameterWithoutGradientStays) {
  at::Tensor used = parameter({2, 2}), unused = parameter({2, 2});
  const at::Tensor before = unused.detach().clone();
  AdamW adamw({{"used", used}, {"unused", unused}}, {.weight_decay = 0.5});
  used.mutable_grad() = at::ones({2, 2}, at::kDouble);
  adamw.take_gradients();
  adamw.step(0.1);
  EXPECT_TRUE(at::equal(unused.detach(), before));
}

TEST(AdamW, RestoredStateContinuesBitForBit) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    at::manual_seed(2);
    at::Tensor p = parameter({4, 4}, dtype), q = p.detach().clone().set_requires_grad(true);
    AdamW one({{"p", p}}, {});
    const auto run = [&](AdamW& adamw, at::Tensor& x, int seed) {
      at::manual_seed(static_cast<std::uint64_t>(seed));
      x.mutable_grad() = at::randn({4, 4}, dtype);
      adamw.take_gradients();
      adamw.step(0.01);
    };
    run(one, p, 3);
    AdamW two({{"p", q}}, {});
    TensorMap saved;
    for (const auto& [name, tensor] : one.tensors()) saved[name] = tensor.detach().clone();
    q.detach().copy_(p.detach());
    ASSERT_TRUE(two.restore(saved).ok());
    run(one, p, 4);
    run(two, q, 4);
    EXPECT_TRUE(at::equal(p.detach(), q.detach()));
    saved.erase("p.step");
    EXPECT_EQ(two.restore(saved).code(), StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace everlong
