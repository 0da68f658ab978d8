#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "mechanisms/softmax/params.h"
#include "mechanisms/softmax/reference.h"

namespace everlong::softmax {
namespace {

struct Data {
  reference::Problem problem;
  std::vector<double> q, k, v, grad_out;
};

void draw(std::vector<double>& x, std::int64_t n, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  x.resize(static_cast<std::size_t>(n));
  for (double& value : x) value = normal(random);
}

// Filled in place: the problem's spans point into it.
void random_case(reference::Problem shape, Data& data) {
  std::mt19937_64 random(static_cast<std::uint64_t>(shape.tokens * 31 + shape.past));
  const auto [T, S] = std::pair(shape.tokens, shape.keys());
  draw(data.q, T * shape.heads * shape.key_dim, random);
  draw(data.k, S * shape.kv_heads * shape.key_dim, random);
  draw(data.v, S * shape.kv_heads * shape.value_dim, random);
  draw(data.grad_out, T * shape.heads * shape.value_dim, random);
  data.problem = shape;
  data.problem.q = data.q;
  data.problem.k = data.k;
  data.problem.v = data.v;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

const std::vector<reference::Problem>& shapes() {
  static const std::vector<reference::Problem> all = [] {
    std::vector<reference::Problem> list;
    for (const std::int64_t window : {0, 1, 2, 7, 100})
      for (const auto& [tokens, past] :
           {std::pair<std::int64_t, std::int64_t>{1, 0}, {1, 9}, {13, 0}, {6, 11}})
        for (const auto& [heads, kv] :
             {std::pair<std::int64_t, std::int64_t>{1, 1}, {4, 2}, {4, 1}}) {
          reference::Problem p;
          p.tokens = tokens, p.past = past, p.heads = heads, p.kv_heads = kv;
          p.key_dim = 5, p.value_dim = 3, p.window = window, p.scale = 0.7;
          list.push_back(p);
        }
    return list;
  }();
  return all;
}

TEST(SoftmaxReference, FormsAgree) {
  for (const auto& shape : shapes()) {
    Data data;
    random_case(shape, data);
    const auto want = reference::parallel(data.problem);
    EXPECT_LT(largest_difference(reference::recurrent(data.problem), want), 1e-12);
    for (const std::int64_t block : {1, 3, 8, 64})
      EXPECT_LT(largest_difference(reference::online(data.problem, block), want), 1e-12);
  }
}

TEST(SoftmaxReference, TwoTokensByHand) {
  // Token 1 sees keys 0 and 1 with scores 0 and ln 3: weights 1/4 and 3/4. Token 0 sees itself
  // alone.
  Data data;
  reference::Problem p;
  p.tokens = 2;
  random_case(p, data);
  data.q = {1, 1};
  data.k = {0, std::log(3.0)};
  data.v = {8, 4};
  data.problem.q = data.q, data.problem.k = data.k, data.problem.v = data.v;
  EXPECT_LT(largest_difference(reference::parallel(data.problem), {8, 5}), 1e-15);
  data.problem.window = 1;
  EXPECT_LT(largest_difference(reference::parallel(data.problem), {8, 4}), 1e-15);
}

TEST(SoftmaxReference, LargeScoresDoNotOverflow) {
  for (const auto& shape : shapes()) {
    Data data;
    auto big = shape;
    big.scale = 2000;
    random_case(big, data);
    const auto want = reference::parallel(data.problem);
    EXPECT_TRUE(std::ranges::all_of(want, [](double x) { return std::isfinite(x); }));
    EXPECT_LT(largest_difference(reference::online(data.problem, 4), want),
              1e-10);  // scores of 1e4: 1e-12 each
  }
}

TEST(SoftmaxReference, GradientsEqualFiniteDifferences) {
  for (const auto& shape : shapes()) {
    if (shape.tokens > 6) continue;
    Data data;
    random_case(shape, data);
    const auto loss = [&] {
      const auto out = reference::parallel(data.problem);
      double sum = 0;
      for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * data.grad_out[i];
      return sum;
    };
    const auto got = reference::gradients(data.problem, data.grad_out);
    const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double kept = x[i],
                     step = 1e-5;  // error h^2 |f'''| / 6 ~ 1e-10, cancellation 1e-15 / h = 1e-10
        x[i] = kept + step;
        const double above = loss();
        x[i] = kept - step;
        const double below = loss();
        x[i] = kept;
        EXPECT_NEAR(gradient[i], (above - below) / (2 * step), 1e-8);
      }
    };
    check(data.q, got.q);
    check(data.k, got.k);
    check(data.v, got.v);
  }
}

TEST(SoftmaxReference, MergeKnowsTheEmptySet) {
  const reference::Partial nothing{{0, 0}, -INFINITY}, some{{1, 2}, 0.5};
  EXPECT_EQ(reference::merge(nothing, some).out, some.out);
  EXPECT_EQ(reference::merge(some, nothing).lse, 0.5);
  EXPECT_EQ(reference::merge(nothing, nothing).out, nothing.out);
}

Params valid() {
  Params p;
  p.tokens = 6, p.heads = 4, p.kv_heads = 2, p.key_dim = 8, p.value_dim = 4;
  return p;
}

TEST(SoftmaxParams, RefusesEachBrokenField) {
  EXPECT_TRUE(validate(valid()).ok());
  const auto refused = [](auto&& change) {
    Params p = valid();
    change(p);
    return !validate(p).ok();
  };
  EXPECT_TRUE(refused([](Params& p) { p.kv_heads = 3; }));
  EXPECT_TRUE(refused([](Params& p) { p.kv_heads = 0; }));
  EXPECT_TRUE(refused([](Params& p) { p.key_dim = 0; }));
  EXPECT_TRUE(refused([](Params& p) { p.window = -1; }));
  EXPECT_TRUE(refused([](Params& p) { p.scale = std::nan(""); }));
  EXPECT_TRUE(refused([](Params& p) { p.scale = 0; }));
  EXPECT_TRUE(refused([](Params& p) { p.cu_seqlens = {0, 4, 3, 6}; }));
  EXPECT_TRUE(refused([](Params& p) { p.cu_seqlens = {0, 4, 7}; }));
  EXPECT_TRUE(refused([](Params& p) { p.cu_seqlens = {1, 6}; }));
  EXPECT_TRUE(refused([](Params& p) { p.cu_seqlens = {0}; }));
  EXPECT_TRUE(refused([](Params& p) { p.batch = 2, p.cu_seqlens = {0, 6}; }));
  EXPECT_TRUE(refused([](Params& p) { p.state_capacity = 3, p.state_lengths = {4}; }));
  EXPECT_TRUE(refused([](Params& p) { p.state_capacity = 3, p.state_lengths = {1, 1}; }));
  EXPECT_FALSE(refused([](Params& p) {
    p.cu_seqlens = {0, 0, 6}, p.state_capacity = 3, p.state_lengths = {3, 0};
  }));
}

TEST(SoftmaxParams, CountsVisiblePairs) {
  for (const std::int64_t window : {0, 1, 3, 50})
    for (const std::int64_t past : {0, 2, 7})
      for (const std::int64_t tokens : {0, 1, 9}) {
        double want = 0;
        for (std::int64_t t = 0; t < tokens; ++t)
          want += static_cast<double>(window > 0 ? std::min(past + t + 1, window) : past + t + 1);
        EXPECT_EQ(visible_pairs(past, tokens, window), want);
      }
}

}  // namespace
}  // namespace everlong::softmax
