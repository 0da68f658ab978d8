#include "ops/rms_norm.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

namespace everlong {
namespace {

at::Tensor direct(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor y = x * at::rsqrt(x.square().mean(-1, true) + eps);
  return weight.defined() ? y * weight : y;
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

TEST(RmsNorm, EqualsTheFormulaAndItsGradient) {
  at::manual_seed(1);
  for (const bool weighted : {false, true}) {
    const at::Tensor x = at::randn({3, 5, 24}, at::kDouble).requires_grad_(true);
    const at::Tensor weight =
        weighted ? at::randn({24}, at::kDouble).requires_grad_(true) : at::Tensor();
    const at::Tensor g = at::randn({3, 5, 24}, at::kDouble);
    const at::Tensor y = rms_norm(x, weight, 1e-2), want = direct(x, weight, 1e-2);
    EXPECT_LT(largest(y - want), 1e-13);
    std::vector<at::Tensor> sources = {x};
    if (weighted) sources.push_back(weight);
    const auto got = torch::autograd::grad({y}, sources, {g});
    const auto expected = torch::autograd::grad({want}, sources, {g});
    for (std::size_t i = 0; i < sources.size(); ++i)
      EXPECT_LT(largest(got[i] - expected[i]), 1e-12) << i;
  }
}

TEST(RmsNorm, LowPrecisionIsRoundedOnce) {
  at::manual_seed(2);
  // Squares of 300 overflow fp16 and lose all digits of the sum in bf16: only fp32 inside gets this
  // right.
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor x = at::randn({4, 512}, at::kDouble).mul_(300).to(dtype);
    const at::Tensor weight = at::ones({512}, dtype);
    const at::Tensor y = rms_norm(x, weight, 1e-6);
    EXPECT_EQ(y.scalar_type(), dtype);
    const at::Tensor want = direct(x.to(at::kDouble), weight.to(at::kDouble), 1e-6);
    const double ulp =
        dtype == at::kHalf ? 0x1p-11 : 0x1p-8;  // half a unit in the last place, relative
    EXPECT_LT(largest((y.to(at::kDouble) - want) / want.abs().clamp_min(1e-3)), 1.01 * ulp);
  }
}

TEST(RmsNorm, TakesEmptyAndStridedRows) {
  EXPECT_EQ(rms_norm(at::empty({2, 0, 8}), {}, 1e-6).sizes(), at::IntArrayRef({2, 0, 8}));
  const at::Tensor wide = at::randn({6, 16}, at::kDouble), x = wide.t().slice(0, 0, 16, 2);
  EXPECT_LT(largest(rms_norm(x, {}, 1e-6) - direct(x, {}, 1e-6)), 1e-13);
}

TEST(RmsNorm, RefusesAWeightOfAnotherWidth) {
  EXPECT_ANY_THROW(rms_norm(at::randn({2, 8}), at::ones({7}), 1e-6));
}

}  // namespace
}  // namespace everlong
