#include "layers/gated_mlp.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "layers/linear.h"
#include "layers/norm.h"

namespace everlong {
namespace {

at::Tensor weight(const torch::nn::Module& module, const std::string& name) {
  return *module.named_parameters().find(name);
}

TEST(GatedMlp, SgluMultipliesWithoutActivation) {
  const auto mlp = make_gated_mlp("sglu", 6, 10, 3).value();
  mlp->to(at::kDouble);
  const at::Tensor x = at::randn({2, 3, 6}, at::kDouble);
  const at::Tensor want = at::matmul(
      at::matmul(x, weight(*mlp, "l1.weight").t()) * at::matmul(x, weight(*mlp, "l2.weight").t()),
      weight(*mlp, "l3.weight").t());
  EXPECT_TRUE(at::allclose(mlp->forward(x), want, 1e-12, 1e-13));
}

TEST(GatedMlp, SwigluGatesWithSilu) {
  const auto mlp = make_gated_mlp("swiglu", 6, 10, 3).value();
  mlp->to(at::kDouble);
  const at::Tensor x = at::randn({2, 3, 6}, at::kDouble);
  const at::Tensor gate = at::matmul(x, weight(*mlp, "gate_proj.weight").t());
  const at::Tensor want =
      at::matmul(gate * at::sigmoid(gate) * at::matmul(x, weight(*mlp, "up_proj.weight").t()),
                 weight(*mlp, "down_proj.weight").t());
  EXPECT_TRUE(at::allclose(mlp->forward(x), want, 1e-12, 1e-13));
}

TEST(GatedMlp, GeluIsTheExactOneBetweenTwoProjections) {
  const auto mlp = make_gated_mlp("gelu", 6, 10, 3).value();
  mlp->to(at::kDouble);
  const at::Tensor x = at::randn({2, 3, 6}, at::kDouble);
  const at::Tensor inner = at::matmul(x, weight(*mlp, "c_fc.weight").t());
  const at::Tensor want = at::matmul(inner * 0.5 * (1 + at::erf(inner / std::sqrt(2.0))),
                                     weight(*mlp, "c_proj.weight").t());
  EXPECT_TRUE(at::allclose(mlp->forward(x), want, 1e-12, 1e-13));
}

TEST(Norm, LayerNormCentresAndHasAWeightAlone) {
  const auto norm = make_norm("layer", 8, 1e-5).value();
  ASSERT_EQ(norm->named_parameters().keys(), std::vector<std::string>{"weight"});
  norm->to(at::kDouble);
  const at::Tensor x = at::randn({4, 8}, at::kDouble), centred = x - x.mean(-1, true);
  const at::Tensor want = centred / (centred.square().mean(-1, true) + 1e-5).sqrt();
  EXPECT_TRUE(at::allclose(norm->forward(x), want, 1e-12, 1e-13));
}

TEST(GatedMlp, InitialisesForItsFanInAndDepth) {
  at::manual_seed(5);
  const auto mlp = make_gated_mlp("sglu", 256, 1024, 8).value();
  // Sample deviation of 262144 draws: within 1 % of the true one (7 sigma).
  EXPECT_NEAR(weight(*mlp, "l1.weight").std().item<double>() * 16, 1, 0.01);
  EXPECT_NEAR(weight(*mlp, "l3.weight").std().item<double>() * 32 * 4, 1, 0.01);
}

TEST(GatedMlp, RefusesOtherNames) { EXPECT_FALSE(make_gated_mlp("geglu", 4, 4, 1).ok()); }

TEST(Norm, FactoryKnowsBothByName) {
  const auto plain = make_norm("srms", 8, 1e-5).value(),
             learned = make_norm("rms", 8, 1e-5).value();
  EXPECT_EQ(plain->parameters().size(), 0U);
  ASSERT_EQ(learned->named_parameters().keys(), std::vector<std::string>{"weight"});
  at::Tensor scale = weight(*learned, "weight");
  {
    at::NoGradGuard guard;
    scale.fill_(3);
  }
  const at::Tensor x = at::randn({4, 8});
  EXPECT_TRUE(at::allclose(learned->forward(x), 3 * plain->forward(x)));
  learned->to(at::kDouble);  // the layer follows its parameter
  EXPECT_EQ(learned->forward(x.to(at::kDouble)).scalar_type(), at::kDouble);
  EXPECT_FALSE(make_norm("batch", 8, 1e-5).ok());
}

}  // namespace
}  // namespace everlong
