#include "train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace everlong {
namespace {

constexpr double kExact = 1e-12;  // a handful of double operations

Schedule schedule(Schedule::Kind kind) {
  return {.kind = kind,
          .learning_rate = 2.0,
          .steps = 100,
          .warmup_steps = 10,
          .decay_fraction = 0.25,
          .min_lr_ratio = 0.1};
}

TEST(Schedule, WarmUpRisesLinearlyAndNeverStartsAtZero) {
  for (const auto kind :
       {Schedule::Kind::kCosine, Schedule::Kind::kWsd, Schedule::Kind::kConstant}) {
    EXPECT_NEAR(schedule(kind).rate(0, 0), 0.2, kExact);
    EXPECT_NEAR(schedule(kind).rate(4, 0), 1.0, kExact);
    EXPECT_NEAR(schedule(kind).rate(9, 0), 2.0, kExact);
    EXPECT_NEAR(schedule(kind).rate(10, 0), 2.0, kExact);
  }
}

TEST(Schedule, CosineIsHalfWayAtTheMiddleOfWhatFollowsTheWarmUp) {
  const auto s = schedule(Schedule::Kind::kCosine);
  EXPECT_NEAR(s.rate(55, 0), 0.5 * (2.0 + 0.2), kExact);
  EXPECT_NEAR(s.rate(10 + 30, 0), 0.2 + 1.8 * 0.5 * (1 + std::cos(M_PI / 3)), kExact);
  EXPECT_NEAR(s.rate(100, 0), 0.2, kExact);
}

TEST(Schedule, WsdIsStableThenFallsLinearly) {
  const auto s = schedule(Schedule::Kind::kWsd);
  EXPECT_NEAR(s.rate(75, 0), 2.0, kExact);
  EXPECT_NEAR(s.rate(80, 0), 2.0 * (0.1 + 0.9 * 0.8), kExact);
  EXPECT_NEAR(s.rate(100, 0), 0.2, kExact);
}

TEST(Schedule, ConstantStays) {
  EXPECT_NEAR(schedule(Schedule::Kind::kConstant).rate(99, 0), 2.0, kExact);
}

TEST(Schedule, TimeLeadsWhenItIsFurtherThanTheSteps) {
  auto s = schedule(Schedule::Kind::kWsd);
  s.max_seconds = 10;
  EXPECT_NEAR(s.fraction(20, 5), 0.5, kExact);
  EXPECT_NEAR(s.fraction(60, 5), 0.6, kExact);
  EXPECT_NEAR(s.rate(20, 8.75), 2.0 * (0.1 + 0.9 * 0.5), kExact);
  EXPECT_NEAR(s.rate(20, 99), 0.2, kExact);
}

TEST(Schedule, WarmUpHoldsEvenWhenTimeRunsAhead) {
  auto s = schedule(Schedule::Kind::kCosine);
  s.max_seconds = 10;
  EXPECT_NEAR(s.rate(0, 2), 0.2, kExact);
}

}  // namespace
}  // namespace everlong
