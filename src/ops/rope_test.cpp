#include "ops/rope.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace everlong {
namespace {

constexpr double kTheta = 10000;

// The definition, coordinate by coordinate, in long double.
double turned(const at::Tensor& x, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d,
              std::int64_t position, std::int64_t rotary, RopePairs pairs) {
  const auto at = [&](std::int64_t i) {
    return static_cast<long double>(x[b][t][h][i].item<double>());
  };
  if (d >= rotary) return static_cast<double>(at(d));
  const bool split = pairs == RopePairs::kHalfSplit;
  const std::int64_t pair = split ? d % (rotary / 2) : d / 2;
  const std::int64_t first = split ? pair : 2 * pair,
                     second = split ? pair + rotary / 2 : 2 * pair + 1;
  const long double angle = static_cast<long double>(position) *
                            std::pow(static_cast<long double>(kTheta), -2.0L * pair / rotary);
  const long double c = std::cos(angle), s = std::sin(angle);
  return static_cast<double>(d == first ? at(first) * c - at(second) * s
                                        : at(second) * c + at(first) * s);
}

double worst(at::ScalarType dtype, RopePairs pairs, std::int64_t rotary, std::int64_t start) {
  at::manual_seed(3);
  const std::int64_t B = 2, T = 3, H = 2, D = 10;
  const at::Tensor x = at::randn({B, T, H, D}, at::kDouble).to(dtype);
  std::vector<std::int64_t> positions;  // the second row is elsewhere in its text
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t t = 0; t < T; ++t) positions.push_back(start + 63 * b + t);
  const auto table =
      make_rope_table(positions, B, rope_frequencies(kTheta, rotary), pairs, dtype, at::kCPU);
  const at::Tensor y = apply_rope(x, table);
  EXPECT_EQ(y.scalar_type(), dtype);
  double error = 0;
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t d = 0; d < D; ++d)
          error =
              std::max(error, std::abs(y[b][t][h][d].item<double>() -
                                       turned(x, b, t, h, d, positions[b * T + t], rotary, pairs)));
  return error;
}

TEST(Rope, EqualsTheFormulaForBothPairings) {
  for (const auto pairs : {RopePairs::kHalfSplit, RopePairs::kInterleaved})
    for (const std::int64_t rotary : {2, 6, 10}) {
      EXPECT_LT(worst(at::kDouble, pairs, rotary, 0), 1e-13);
      EXPECT_LT(worst(at::kFloat, pairs, rotary, 100), 1e-6);
      EXPECT_LT(worst(at::kBFloat16, pairs, rotary, 100),
                0x1p-8 * 4);  // one rounding of values up to 4
    }
}

TEST(Rope, PositionOneBillionIsExactToFp32) {
  EXPECT_LT(worst(at::kFloat, RopePairs::kHalfSplit, 10, 1000000000), 2e-6);
  EXPECT_LT(worst(at::kDouble, RopePairs::kInterleaved, 10, 1000000000), 1e-6);
}

TEST(Rope, AnyCutGetsTheSameBits) {
  const auto frequencies = rope_frequencies(kTheta, 16);
  std::vector<std::int64_t> positions(300);
  for (std::size_t i = 0; i < positions.size(); ++i)
    positions[i] = 1000 + static_cast<std::int64_t>(i);
  const auto whole =
      make_rope_table(positions, 1, frequencies, RopePairs::kHalfSplit, at::kFloat, at::kCPU);
  for (const std::size_t cut : {1, 24, 25, 63, 64, 65, 299}) {
    const auto tail = make_rope_table(std::span(positions).subspan(cut), 1, frequencies,
                                      RopePairs::kHalfSplit, at::kFloat, at::kCPU);
    EXPECT_TRUE(at::equal(tail.cos, whole.cos.slice(0, static_cast<std::int64_t>(cut))));
    EXPECT_TRUE(at::equal(tail.sin, whole.sin.slice(0, static_cast<std::int64_t>(cut))));
  }
}

// fp32 on the CPU goes through the kernel: vectors and what is left of them, rows anywhere.
TEST(Rope, TheKernelAgreesWithTheTensorForm) {
  at::manual_seed(5);
  const std::int64_t B = 2, T = 37, H = 3, D = 80, rotary = 74;  // 37 pairs: lanes and a rest
  std::vector<std::int64_t> positions;
  for (std::int64_t i = 0; i < B * T; ++i) positions.push_back(7 * i % 1000);
  for (const auto pairs : {RopePairs::kHalfSplit, RopePairs::kInterleaved})
    for (const std::int64_t batch : {std::int64_t{1}, B}) {
      const std::span some(positions.data(), static_cast<std::size_t>(batch * T));
      const auto table = [&](at::ScalarType dtype) {
        return make_rope_table(some, batch, rope_frequencies(kTheta, rotary), pairs, dtype,
                               at::kCPU);
      };
      // Heads before tokens, in rows that are longer.
      const at::Tensor wide = at::randn({B, H, T, 2 * D}, at::kDouble);
      const at::Tensor x = wide.narrow(3, D, D).transpose(1, 2);
      const at::Tensor wanted = apply_rope(x, table(at::kDouble));
      const at::Tensor leaf = x.to(at::kFloat).requires_grad_(true);
      const at::Tensor view = wide.to(at::kFloat).narrow(3, D, D).transpose(1, 2);
      const at::Tensor got = apply_rope(view, table(at::kFloat));
      EXPECT_LT((got - wanted).abs().max().item<double>(), 2e-6);
      const at::Tensor g = at::randn_like(x);
      const at::Tensor grad = torch::autograd::grad({apply_rope(leaf, table(at::kFloat))}, {leaf},
                                                    {g.to(at::kFloat)})[0];
      const at::Tensor same = x.detach().clone().requires_grad_(true);
      const at::Tensor grad64 =
          torch::autograd::grad({apply_rope(same, table(at::kDouble))}, {same}, {g})[0];
      EXPECT_LT((grad - grad64).abs().max().item<double>(), 2e-6);
    }
}

TEST(Rope, GradientTurnsBack) {
  at::manual_seed(4);
  const std::vector<std::int64_t> positions = {5, 6, 7};
  for (const auto pairs : {RopePairs::kHalfSplit, RopePairs::kInterleaved}) {
    const auto table =
        make_rope_table(positions, 1, rope_frequencies(kTheta, 6), pairs, at::kDouble, at::kCPU);
    const at::Tensor x = at::randn({1, 3, 2, 8}, at::kDouble).requires_grad_(true);
    const at::Tensor g = at::randn({1, 3, 2, 8}, at::kDouble),
                     u = at::randn({1, 3, 2, 8}, at::kDouble);
    const at::Tensor grad = torch::autograd::grad({apply_rope(x, table)}, {x}, {g})[0];
    // The map is linear: <g, R u> = <R^T g, u> for every u.
    const double left = (g * apply_rope(u, table)).sum().item<double>(),
                 right = (grad * u).sum().item<double>();
    EXPECT_NEAR(left, right, 1e-12);
  }
}

}  // namespace
}  // namespace everlong
