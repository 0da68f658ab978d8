#include "kernels/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <set>

namespace everlong {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// log p for p in sixteenths: exact ratios up to the rounding of log and exp.
std::vector<float> logits_of(const std::vector<double>& weights) {
  std::vector<float> logits;
  for (const double weight : weights) logits.push_back(static_cast<float>(std::log(weight)));
  return logits;
}

std::map<std::int32_t, int> draws(const SamplingParams& params, std::span<const float> logits,
                                  int count) {
  Sampler sampler(params);
  std::map<std::int32_t, int> seen;
  for (int i = 0; i < count; ++i) {
    const auto token = sampler.draw(logits);
    EXPECT_TRUE(token.ok()) << token.status().message();
    if (!token.ok()) break;
    ++seen[*token];
  }
  return seen;
}

// The ids that are ever drawn. Every candidate of these tests has p > 1/50: 2,000 draws miss one
// with p < 1e-17.
std::set<std::int32_t> support(const SamplingParams& params, std::span<const float> logits) {
  std::set<std::int32_t> ids;
  for (const auto& [id, count] : draws(params, logits, 2000)) ids.insert(id);
  return ids;
}

using Ids = std::set<std::int32_t>;

// Sum of (seen - expected)^2 / expected.
double chi_square(const std::map<std::int32_t, int>& seen, const std::vector<double>& probabilities,
                  int count) {
  double sum = 0;
  for (std::size_t id = 0; id < probabilities.size(); ++id) {
    const auto found = seen.find(static_cast<std::int32_t>(id));
    const double expected = probabilities[id] * count;
    const double difference = (found == seen.end() ? 0 : found->second) - expected;
    sum += difference * difference / expected;
  }
  return sum;
}

TEST(Sampling, DrawsFollowTheSoftmax) {
  const std::vector<double> p = {0.5, 0.25, 0.125, 0.0625, 0.0625};
  const auto seen = draws({.seed = 7}, logits_of(p), 40000);
  // 4 degrees of freedom: 23.5 is exceeded once in 10,000 seeds, and this seed is fixed.
  EXPECT_LT(chi_square(seen, p, 40000), 23.5);
}

TEST(Sampling, TemperatureDividesTheLogits) {
  const auto seen = draws({.temperature = 2, .seed = 7}, logits_of({16, 4, 1}), 40000);
  EXPECT_LT(chi_square(seen, {4.0 / 7, 2.0 / 7, 1.0 / 7}, 40000),
            18.5);  // 2 degrees of freedom, p = 1e-4
}

TEST(Sampling, TemperatureZeroTakesTheLargestAndTheLowestIdOfEquals) {
  const std::vector<float> logits = {1, 3, 2, 3};
  for (const std::uint64_t seed : {0, 1, 2, 3})
    EXPECT_EQ(support({.temperature = 0, .top_k = 3, .top_p = 0.5, .seed = seed}, logits), Ids{1});
}

TEST(Sampling, TopKKeepsExactlyKAndTheLowestIdsOfEquals) {
  EXPECT_EQ(support({.top_k = 2}, logits_of({1, 8, 4, 2})), (Ids{1, 2}));
  EXPECT_EQ(support({.top_k = 3}, logits_of({1, 1, 4, 1, 1})), (Ids{0, 1, 2}));
  EXPECT_EQ(support({.top_k = 9}, logits_of({1, 1, 4})), (Ids{0, 1, 2}));
}

TEST(Sampling, TopPKeepsTheSmallestSetThatReachesP) {
  const auto logits = logits_of({1, 4, 1, 8, 2});  // of 16: 8, 12, 14, then the first of two equals
  EXPECT_EQ(support({.top_p = 0.49}, logits), (Ids{3}));
  EXPECT_EQ(support({.top_p = 0.51}, logits), (Ids{1, 3}));
  EXPECT_EQ(support({.top_p = 0.76}, logits), (Ids{1, 3, 4}));
  EXPECT_EQ(support({.top_p = 0.90}, logits), (Ids{0, 1, 3, 4}));
  EXPECT_EQ(support({.top_p = 1e-9}, logits), (Ids{3}));
  // Equal logits sum without rounding: two of four reach exactly one half.
  EXPECT_EQ(support({.top_p = 0.5}, std::vector<float>{3, 3, 3, 3}), (Ids{0, 1}));
}

TEST(Sampling, TopPCountsProbabilitiesAfterTopK) {
  // Alone 0.7 needs {8, 4} of 16; among the best two, 8/12 < 0.7 needs both, and 0.6 only the
  // first.
  EXPECT_EQ(support({.top_k = 2, .top_p = 0.6}, logits_of({8, 4, 2, 2})), (Ids{0}));
  EXPECT_EQ(support({.top_p = 0.6}, logits_of({8, 4, 2, 2})), (Ids{0, 1}));
}

TEST(Sampling, MinPIsRelativeToTheLargest) {
  const auto logits = logits_of({16, 8, 4, 2});
  EXPECT_EQ(support({.min_p = 0.2}, logits), (Ids{0, 1, 2}));
  EXPECT_EQ(support({.min_p = 0.3}, logits), (Ids{0, 1}));
  EXPECT_EQ(support({.min_p = 1.0}, std::vector<float>{2, 5, 5, 1}), (Ids{1, 2}));
  // After the temperature: 4/16 becomes 1/2.
  EXPECT_EQ(support({.temperature = 2, .min_p = 0.4}, logits), (Ids{0, 1, 2}));
}

TEST(Sampling, WhatIsKeptIsRenormalised) {
  const auto logits = logits_of({1, 3, 1, 1, 2});
  for (const SamplingParams& params :
       {SamplingParams{.top_k = 2, .seed = 3}, SamplingParams{.top_p = 0.6, .seed = 3},
        SamplingParams{.min_p = 0.5, .seed = 3}}) {
    const auto seen = draws(params, logits, 40000);
    ASSERT_EQ(seen.size(), 2U);
    // 1 degree of freedom, p = 1e-4
    EXPECT_LT(chi_square({{0, seen.at(1)}, {1, seen.at(4)}}, {0.6, 0.4}, 40000), 15.1);
  }
}

TEST(Sampling, MinusInfinityIsNeverDrawn) {
  EXPECT_EQ(support({}, std::vector<float>{-kInf, 0, -kInf, 0, -kInf}), (Ids{1, 3}));
  EXPECT_EQ(support({.temperature = 0}, std::vector<float>{-kInf, -5}), (Ids{1}));
}

TEST(Sampling, PenaltyDividesPositiveAndMultipliesNegativeLogitsOncePerId) {
  SamplingParams params{.temperature = 0, .repetition_penalty = 2};
  Sampler positive(params);
  for (int i = 0; i < 3; ++i) positive.saw(0);
  // 6 / 2 = 3 beats 2.9 however often the token was seen, and loses to 3.1.
  EXPECT_EQ(*positive.draw(std::vector<float>{6, 2.9F}), 0);
  EXPECT_EQ(*positive.draw(std::vector<float>{6, 3.1F}), 1);
  Sampler negative(params);
  negative.saw(0);
  EXPECT_EQ(*negative.draw(std::vector<float>{-1, -1.9F}), 1);  // -1 * 2 = -2
  Sampler fresh(params);
  EXPECT_EQ(*fresh.draw(std::vector<float>{-1, -1.9F}), 0);
}

TEST(Sampling, PenaltyForgetsTokensBeyondItsWindow) {
  Sampler sampler({.temperature = 0, .repetition_penalty = 100, .penalty_window = 2});
  const std::vector<float> logits = {4, 3, 2};
  EXPECT_EQ(*sampler.draw(logits), 0);  // 0 is remembered
  EXPECT_EQ(*sampler.draw(logits), 1);  // 0, 1
  EXPECT_EQ(*sampler.draw(logits), 2);  // 1, 2: 0 is forgotten
  EXPECT_EQ(*sampler.draw(logits), 0);
  EXPECT_EQ(*sampler.draw(logits), 1);
}

TEST(Sampling, SameSeedSameTokens) {
  const auto logits = logits_of({1, 2, 3, 4, 5, 6, 7, 8});
  Sampler a({.seed = 5}), b({.seed = 5}), c({.seed = 6});
  std::vector<std::int32_t> of_a, of_b, of_c;
  for (int i = 0; i < 50; ++i) {
    of_a.push_back(*a.draw(logits));
    of_b.push_back(*b.draw(logits));
    of_c.push_back(*c.draw(logits));
  }
  EXPECT_EQ(of_a, of_b);
  EXPECT_NE(of_a, of_c);
}

// mt19937_64's 10,000th value is fixed by the C++ standard; the draw must be the plain reading of
// its high bits.
TEST(Sampling, TheUniformDrawIsTheTopBitsOfTheGenerator) {
  std::mt19937_64 generator(11);
  Sampler sampler({.seed = 11});
  const std::vector<float> logits(1000, 0.5F);
  for (int i = 0; i < 200; ++i) {
    const double u = static_cast<double>(generator() >> 11) / 9007199254740992.0;
    EXPECT_EQ(*sampler.draw(logits), static_cast<std::int32_t>(u * 1000));
  }
}

TEST(Sampling, LogitsThatAreNotNumbersAreRefused) {
  Sampler sampler({});
  EXPECT_NE(sampler.draw(std::vector<float>{0, kNaN, 1}).status().message().find("logits[1]"),
            std::string::npos);
  EXPECT_FALSE(sampler.draw(std::vector<float>{0, kInf}).ok());
  EXPECT_FALSE(sampler.draw(std::vector<float>{-kInf, -kInf}).ok());
  EXPECT_FALSE(sampler.draw({}).ok());
  Sampler greedy({.temperature = 0});
  EXPECT_FALSE(greedy.draw(std::vector<float>{kNaN, 1}).ok());
}

TEST(Sampling, ParametersOutOfRangeAreRefusedByName) {
  const auto expect_named = [](const SamplingParams& params, std::string_view name) {
    const Status status = validate(params);
    ASSERT_FALSE(status.ok()) << name;
    EXPECT_EQ(status.message().find(name), 0U) << status.message();
    EXPECT_FALSE(Sampler(params).draw(std::vector<float>{1, 2}).ok()) << name;
  };
  EXPECT_TRUE(validate({}).ok());
  expect_named({.temperature = -1}, "temperature");
  expect_named({.temperature = std::nan("")}, "temperature");
  expect_named({.top_k = -1}, "top_k");
  expect_named({.top_p = 0}, "top_p");
  expect_named({.top_p = 1.1}, "top_p");
  expect_named({.top_p = std::nan("")}, "top_p");
  expect_named({.min_p = -0.1}, "min_p");
  expect_named({.min_p = 1.5}, "min_p");
  expect_named({.repetition_penalty = 0}, "repetition_penalty");
  expect_named({.penalty_window = -1}, "penalty_window");
}

TEST(Sampler, GoesOnFromItsSavedTextAsIfNeverStopped) {
  const SamplingParams params{.repetition_penalty = 1.5, .penalty_window = 5, .seed = 3};
  std::vector<float> logits;
  for (int i = 0; i < 20; ++i) logits.push_back(static_cast<float>(std::sin(1.7 * i)));
  Sampler whole(params);
  for (int i = 0; i < 33; ++i) ASSERT_TRUE(whole.draw(logits).ok());
  Sampler again(params);
  ASSERT_TRUE(again.restore(whole.save()).ok());
  for (int i = 0; i < 200; ++i) EXPECT_EQ(*again.draw(logits), *whole.draw(logits)) << "draw " << i;
}

TEST(Sampler, RefusesTextThatNoSamplerSavedAndStaysAsItWas) {
  Sampler sampler(SamplingParams{.seed = 4}), same(SamplingParams{.seed = 4});
  const std::string sound = sampler.save();
  for (const std::string& text :
       {std::string(), std::string("x"), std::string("3 1 2"), std::string("99999999999 1"),
        sound + " 1", sound.substr(0, sound.size() / 2)})
    EXPECT_FALSE(sampler.restore(text).ok()) << text.substr(0, 20);
  const std::vector<float> logits(50, 0.0f);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(*sampler.draw(logits), *same.draw(logits));
}

}  // namespace
}  // namespace everlong
