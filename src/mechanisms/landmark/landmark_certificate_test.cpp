#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/random.h"
#include "mechanisms/landmark/kernel_certificate.h"

namespace everlong::landmark {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double gaussian(Random& random) {
  return std::sqrt(-2 * std::log(1 - random.share())) * std::cos(2 * M_PI * random.share());
}

// One query over blocks of values: gates and inner weights drawn, outputs in fp64 by definition.
struct Problem {
  static constexpr std::int64_t kTokens = 7, kDim = 8, kLocal = 5;
  std::vector<float> scores, norms;
  std::vector<std::vector<double>> means;  // of each block's values under its inner weights
  double local_lse = -kInf, local_norm = 0;
  std::vector<double> local = std::vector<double>(kDim);

  Problem(Random& random, std::int64_t blocks, double spread) {
    double sum = 0;
    for (std::int64_t j = 0; j < kLocal; ++j) {
      const double weight = std::exp(spread * gaussian(random));
      sum += weight;
      double squares = 0;
      for (auto& x : local) {
        const double v = gaussian(random);
        x += weight * v;
        squares += v * v;
      }
      local_norm = std::max(local_norm, std::sqrt(squares));
    }
    for (auto& x : local) x /= sum;
    local_lse = std::log(sum);
    for (std::int64_t b = 0; b < blocks; ++b) {
      scores.push_back(static_cast<float>(spread * gaussian(random)));
      std::vector<double> mean(kDim);
      double inner = 0, largest = 0;
      const double size = random.share() < 0.2 ? 3 : 0.5;  // some blocks have large values
      // Sometimes one token has all the weight, so that the bound is nearly reached.
      const double sharpness = random.share() < 0.5 ? 30 : 1;
      for (std::int64_t t = 0; t < kTokens; ++t) {
        const double weight = std::exp(sharpness * gaussian(random));
        inner += weight;
        double squares = 0;
        for (auto& x : mean) {
          const double v = size * gaussian(random);
          x += weight * v;
          squares += v * v;
        }
        largest = std::max(largest, std::sqrt(squares));
      }
      for (auto& x : mean) x /= inner;
      means.push_back(mean);
      norms.push_back(std::nextafter(static_cast<float>(largest), HUGE_VALF));
    }
  }

  struct Output {
    std::vector<double> out;
    double lse;
  };
  Output over(const std::vector<std::int64_t>& blocks) const {
    double top = local_lse;
    for (const std::int64_t b : blocks) top = std::max<double>(top, scores[b]);
    double sum = std::exp(local_lse - top);
    std::vector<double> out(kDim);
    for (std::int64_t i = 0; i < kDim; ++i) out[i] = sum * local[i];
    for (const std::int64_t b : blocks) {
      const double weight = std::exp(scores[b] - top);
      sum += weight;
      for (std::int64_t i = 0; i < kDim; ++i) out[i] += weight * means[b][i];
    }
    for (auto& x : out) x /= sum;
    return {out, top + std::log(sum)};
  }
  std::vector<std::int64_t> all() const {
    std::vector<std::int64_t> list(scores.size());
    std::iota(list.begin(), list.end(), 0);
    return list;
  }
};

double norm(const std::vector<double>& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

struct Judged {
  Certificate certificate;
  double error = 0;
};

Judged judge(const Problem& p, const std::vector<std::int64_t>& read, Unread unread) {
  const auto whole = p.over(p.all()), part = p.over(read);
  UnreadBlocks rest;
  for (const std::int64_t b : p.all())
    if (!std::ranges::binary_search(read, b)) rest.add(p.scores[b], p.norms[b]);
  Judged judged{rest.certify(part.lse, norm(part.out), unread), 0};
  const double share = unread == Unread::kLeftOut ? 1 : 1 - judged.certificate.unread_share;
  std::vector<double> error(whole.out.size());
  for (std::size_t i = 0; i < error.size(); ++i) error[i] = share * part.out[i] - whole.out[i];
  judged.error = norm(error);
  EXPECT_NEAR(judged.certificate.lse, whole.lse, 1e-12 * (1 + std::abs(whole.lse)));
  return judged;
}

// The subtraction in judge() rounds; outputs are of order 1.
constexpr double kRounding = 1e-14;

TEST(LandmarkCertificate, TrueErrorsNeverExceedTheBound) {
  constexpr int kQueries = 10'000;
  constexpr std::int64_t kBlocks = 64;
  // Standard deviations of the scores: flat attention to peaked, a quarter of the queries each.
  constexpr double kSpreads[] = {1, 4, 10, 20};
  constexpr std::int64_t kReads[] = {0, 1, 2, 4, 8, 16, 32, 48, 63, 64};
  int certified[std::size(kReads)][2][std::size(kSpreads)] = {};
  double tightest[std::size(kReads)][2] = {};
  for (int i = 0; i < kQueries; ++i) {
    Random random{mixed_seed({11, static_cast<std::uint64_t>(i)})};
    const std::size_t spread = static_cast<std::size_t>(i) % std::size(kSpreads);
    const Problem p(random, kBlocks, kSpreads[spread]);
    for (std::size_t r = 0; r < std::size(kReads); ++r)
      for (const Unread unread : {Unread::kLeftOut, Unread::kWithTrueSum}) {
        const auto choice =
            choose_blocks(p.scores, p.norms, p.local_lse, p.local_norm,
                          {.epsilon = 0, .at_least = kReads[r], .at_most = kReads[r]}, unread);
        ASSERT_EQ(static_cast<std::int64_t>(choice.blocks.size()), kReads[r]);
        const Judged judged = judge(p, choice.blocks, unread);
        ASSERT_LE(judged.error, judged.certificate.bound + kRounding) << "query " << i;
        ASSERT_LE(judged.certificate.bound, choice.bound * (1 + 1e-9) + kRounding);
        const auto which = static_cast<std::size_t>(unread);
        certified[r][which][spread] += judged.certificate.bound <= 1e-3;
        if (judged.certificate.bound > 1e-6)
          tightest[r][which] =
              std::max(tightest[r][which], judged.error / judged.certificate.bound);
      }
  }
  std::printf(
      "share of %d queries certified at 1e-3, by the scores' deviation 1, 4, 10, 20\n"
      "blocks read of %ld | left out | with the true sum | largest error / bound, each\n",
      kQueries, static_cast<long>(kBlocks));
  for (std::size_t r = 0; r < std::size(kReads); ++r) {
    std::printf("%3ld |", static_cast<long>(kReads[r]));
    for (const auto& shares : certified[r]) {
      for (const int count : shares)
        std::printf(" %.4f", count * double{std::size(kSpreads)} / kQueries);
      std::printf(" |");
    }
    std::printf(" %.3f %.3f\n", tightest[r][0], tightest[r][1]);
    if (kReads[r] < kBlocks) {
      EXPECT_GT(tightest[r][1], 0.5) << "a bound far above every error says little";
    }
  }
}

TEST(LandmarkCertificate, ReadsAsManyBlocksAsTheBoundNeedsAndNoMore) {
  Random random{12};
  for (int i = 0; i < 2000; ++i) {
    const Problem p(random, 40, 1 + random.share() * 6);
    const double epsilon = std::pow(10, -random.between(1, 6));
    const std::int64_t least = random.between(0, 4);
    for (const Unread unread : {Unread::kLeftOut, Unread::kWithTrueSum}) {
      const auto choice = choose_blocks(p.scores, p.norms, p.local_lse, p.local_norm,
                                        {.epsilon = epsilon, .at_least = least}, unread);
      ASSERT_TRUE(choice.certified);
      ASSERT_LE(judge(p, choice.blocks, unread).error, epsilon + kRounding);
      ASSERT_LE(judge(p, choice.blocks, unread).certificate.bound, epsilon * (1 + 1e-9));
      const auto count = static_cast<std::int64_t>(choice.blocks.size());
      if (count <= least) continue;
      // One block less, chosen as well as can be, is not enough.
      const auto fewer =
          choose_blocks(p.scores, p.norms, p.local_lse, p.local_norm,
                        {.epsilon = epsilon, .at_least = least, .at_most = count - 1}, unread);
      EXPECT_FALSE(fewer.certified);
      EXPECT_EQ(static_cast<std::int64_t>(fewer.blocks.size()), count - 1);
      EXPECT_GT(fewer.bound, epsilon);
    }
  }
}

TEST(LandmarkCertificate, TheBestByScoreAreAlwaysRead) {
  // Equal scores: the younger; and the one whose values are zero is read only because it must be.
  const std::vector<float> scores{1, 2, 2, 2, -3}, norms{1, 1, 1, 0, 1};
  const auto choice =
      choose_blocks(scores, norms, -kInf, 0, {.epsilon = 100, .at_least = 2}, Unread::kWithTrueSum);
  EXPECT_EQ(choice.blocks, (std::vector<std::int64_t>{2, 3}));
  const auto third = choose_blocks(
      scores, norms, -kInf, 0, {.epsilon = 0, .at_least = 0, .at_most = 3}, Unread::kWithTrueSum);
  EXPECT_EQ(third.blocks, (std::vector<std::int64_t>{0, 1, 2})) << "by share of the bound";
}

TEST(LandmarkCertificate, ExtremesGiveNumbersOrCertifyNothing) {
  UnreadBlocks none;
  EXPECT_EQ(none.certify(2.5, 7, Unread::kLeftOut).bound, 0);
  EXPECT_EQ(none.certify(2.5, 7, Unread::kLeftOut).lse, 2.5);
  UnreadBlocks hidden;
  hidden.add(-kInf, 5);
  EXPECT_EQ(hidden.certify(0, 7, Unread::kLeftOut).bound, 0);
  UnreadBlocks huge;  // sums that overflow without care
  huge.add(-900, 1);
  huge.add(900, 2);
  huge.add(800, 3);
  EXPECT_NEAR(huge.certify(-kInf, 0, Unread::kWithTrueSum).bound, 2, 1e-8);
  EXPECT_NEAR(huge.certify(900, 1, Unread::kLeftOut).bound, 1.5, 1e-8);
  EXPECT_EQ(huge.certify(2000, 1, Unread::kLeftOut).bound, 0) << "gates that underflow";
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [score, size] : {std::pair<float, float>{nan, 1}, {1, nan}, {HUGE_VALF, 1}}) {
    UnreadBlocks broken;
    broken.add(0, 1);
    broken.add(score, size);
    EXPECT_EQ(broken.certify(0, 1, Unread::kWithTrueSum).bound, kInf);
    const std::vector<float> scores{0, score, 1}, norms{1, size, 1};
    for (const Unread unread : {Unread::kLeftOut, Unread::kWithTrueSum}) {
      const auto one = choose_blocks(scores, norms, 0, 1, {.at_least = 0, .at_most = 1}, unread);
      EXPECT_EQ(one.blocks.size(), 1U);
      EXPECT_FALSE(one.certified);
      EXPECT_EQ(choose_blocks(scores, norms, 0, 1, {}, unread).bound, 0) << "nothing is unread";
    }
  }
  EXPECT_TRUE(choose_blocks({}, {}, -kInf, 0, {}, Unread::kLeftOut).certified);
}

}  // namespace
}  // namespace everlong::landmark
