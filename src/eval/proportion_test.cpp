#include "eval/proportion.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

// Values of the score interval as R's prop.test(x, n, correct = FALSE) prints them, to its digits.
TEST(Proportion, WilsonIntervalsAreThePublishedOnes) {
  const auto near = [](std::int64_t successes, std::int64_t trials, double low, double high) {
    const Proportion p{successes, trials};
    EXPECT_NEAR(p.low(), low, 5e-5) << successes << "/" << trials;
    EXPECT_NEAR(p.high(), high, 5e-5) << successes << "/" << trials;
  };
  near(20, 20, 0.8389, 1);
  near(60, 60, 0.9398, 1);
  near(300, 300, 0.9874, 1);
  near(0, 60, 0, 0.0602);
  near(0, 6, 0, 0.3903);
  near(81, 263, 0.2553, 0.3662);  // Newcombe, Statistics in Medicine 17 (1998), table I
  near(15, 148, 0.0624, 0.1605);
  near(1, 29, 0.0061, 0.1718);
}

TEST(Proportion, OfNothingNothingIsKnown) {
  const Proportion none;
  EXPECT_EQ(none.share(), 0);
  EXPECT_EQ(none.low(), 0);
  EXPECT_EQ(none.high(), 1);
}

TEST(Proportion, FailuresMirrorSuccesses) {
  for (std::int64_t successes = 0; successes <= 17; ++successes) {
    const Proportion p{successes, 17}, q{17 - successes, 17};
    EXPECT_NEAR(p.low(), 1 - q.high(), 1e-12);
    EXPECT_LE(p.low(), p.share());
    EXPECT_GE(p.high(), p.share());
  }
}

TEST(Proportion, AddsUp) {
  Proportion sum;
  sum.add(true);
  sum.add(false);
  sum.add({3, 4});
  EXPECT_EQ(sum.successes, 4);
  EXPECT_EQ(sum.trials, 6);
}

TEST(Proportion, PercentIsWholeOnlyWhereItIsExact) {
  EXPECT_EQ(percent(1), "100");
  EXPECT_EQ(percent(0), "0");
  EXPECT_EQ(percent(0.99999), "99.9");
  EXPECT_EQ(percent(0.00001), "0.1");
  EXPECT_EQ(percent(0.5), "50.0");
}

}  // namespace
}  // namespace everlong
