#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "mechanisms/landmark/reference.h"
#include "mechanisms/landmark/reference_retrieval.h"

namespace everlong::landmark {
namespace {

// Rounding of sums of some hundred terms of size 1.
constexpr double kSame = 1e-12;

std::vector<double> draw(std::int64_t count, std::uint64_t seed, double size = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, size);
  std::vector<double> x;
  for (std::int64_t i = 0; i < count; ++i) x.push_back(normal(random));
  return x;
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return std::isfinite(std::accumulate(a.begin(), a.end(), 0.0)) ? worst : INFINITY;
}

struct Case {
  std::int64_t tokens, past, heads, kv_heads, dim;
  std::vector<std::uint8_t> marks;
  std::vector<double> q, k, v, grad;
  bool drop = false;

  Case(std::vector<std::uint8_t> landmarks, std::int64_t past_in, std::uint64_t seed,
       double size = 1)
      : past(past_in), heads(4), kv_heads(2), dim(6), marks(std::move(landmarks)) {
    const auto keys = static_cast<std::int64_t>(marks.size());
    tokens = keys - past;
    q = draw(tokens * heads * dim, seed, size);
    k = draw(keys * kv_heads * dim, seed + 1);
    v = draw(keys * kv_heads * dim, seed + 2);
    grad = draw(tokens * heads * dim, seed + 3);
  }
  reference::Problem problem() const {
    return {tokens, past, heads, kv_heads, dim, dim, 0.4, drop, q, k, v, marks};
  }
};

// Regular blocks with and without a phase, no landmark, uneven sections with two landmarks in a row
// and one in front, a text that ends with one, past keys, and scores of size 30.
std::vector<Case> cases() {
  std::vector<Case> list;
  list.emplace_back(regular_landmarks(0, 29, 8), 0, 1);
  list.emplace_back(regular_landmarks(0, 26, 5, 3), 11, 5);
  list.emplace_back(std::vector<std::uint8_t>(9), 0, 9);
  list.emplace_back(
      std::vector<std::uint8_t>{1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1}, 0, 13);
  list.emplace_back(regular_landmarks(0, 24, 2), 3, 17);
  list.emplace_back(regular_landmarks(0, 40, 8), 0, 21, 30);
  for (std::size_t i = 0, count = list.size(); i < count; ++i) {
    list.push_back(list[i]);
    list.back().drop = true;
  }
  return list;
}

TEST(LandmarkReference, TheTwoLevelFormIsTheParallelOne) {
  for (const Case& c : cases())
    EXPECT_LT(distance(reference::two_level(c.problem()), reference::parallel(c.problem())), kSame);
}

TEST(LandmarkReference, WeightsSumToOneUnlessASectionIsEmpty) {
  const auto scores = draw(20, 3);
  const std::vector<std::uint8_t> marks = {1, 0, 0, 0, 1, 1, 0, 0, 0, 0,
                                           0, 1, 0, 0, 1, 1, 1, 0, 0, 1};
  for (const bool drop : {false, true})
    for (std::int64_t own = 0; own < 20; ++own) {
      const auto w = reference::grouped_softmax(scores, marks, own, drop);
      double sum = 0;
      for (std::int64_t j = 0; j < 20; ++j) {
        sum += w[j];
        EXPECT_GE(w[j], 0);
        if (marks[j] != 0 || j > own) {
          EXPECT_EQ(w[j], 0);
        }
      }
      if (own == 0) {  // a landmark in front sees nothing
        EXPECT_EQ(sum, 0);
      } else if (drop) {
        EXPECT_NEAR(sum, 1, 1e-14);
      } else {  // the first section is empty
        EXPECT_LT(sum, 1 - 1e-3);
      }
    }
}

TEST(LandmarkReference, AGateAsLargeAsItsBlockGivesTheSoftmaxOverAllOrdinaryTokens) {
  auto scores = draw(17, 4);
  const auto marks = regular_landmarks(0, 17, 4);
  double all = 0;
  for (std::int64_t j = 0; j < 17; ++j) {
    if (marks[j] == 0) {
      all += std::exp(scores[j]);
      continue;
    }
    double block = 0;
    for (std::int64_t i = j - 3; i < j; ++i) block += std::exp(scores[i]);
    scores[j] = std::log(block);
  }
  const auto w = reference::grouped_softmax(scores, marks, 16, false);
  for (std::int64_t j = 0; j < 17; ++j)
    EXPECT_NEAR(w[j], marks[j] != 0 ? 0 : std::exp(scores[j]) / all, 1e-14);
}

TEST(LandmarkReference, TheGradientAgreesWithFiniteDifferences) {
  for (Case c : cases()) {
    if (c.q.front() * c.q.front() > 100) continue;  // differences of steep functions say nothing
    const auto loss = [&] {
      const auto out = reference::parallel(c.problem());
      return std::inner_product(out.begin(), out.end(), c.grad.begin(), 0.0);
    };
    const auto by_hand = reference::gradients(c.problem(), c.grad);
    for (auto [x, d] : {std::pair{&c.q, &by_hand.q}, {&c.k, &by_hand.k}, {&c.v, &by_hand.v}}) {
      const auto direction = draw(static_cast<std::int64_t>(x->size()), 77);
      const auto original = *x;
      const auto at = [&](double step) {
        for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] = original[i] + step * direction[i];
        return loss();
      };
      const double numeric = (at(1e-4) - at(-1e-4)) / 2e-4;
      *x = original;
      const double exact = std::inner_product(d->begin(), d->end(), direction.begin(), 0.0);
      EXPECT_NEAR(numeric, exact, 1e-6 * std::max(1.0, std::abs(exact)));
    }
  }
}

TEST(LandmarkReference, LandmarksHaveNoUseForAValue) {
  Case c(regular_landmarks(0, 29, 8), 0, 1);
  const auto d = reference::gradients(c.problem(), c.grad);
  for (std::int64_t j = 0; j < 29; ++j)
    for (std::int64_t i = 0; c.marks[j] != 0 && i < c.kv_heads * c.dim; ++i)
      EXPECT_EQ(d.v[j * c.kv_heads * c.dim + i], 0);
}

struct Text {
  std::int64_t tokens, heads = 4, kv_heads = 2, dim = 8;
  std::vector<double> q, k, v;
  explicit Text(std::int64_t count, std::uint64_t seed) : tokens(count) {
    q = draw(tokens * heads * dim, seed);
    k = draw(tokens * kv_heads * dim, seed + 1);
    v = draw(tokens * kv_heads * dim, seed + 2);
  }
  reference::Read read(const Retrieval& retrieval, std::vector<std::int64_t> chunks) const {
    return reference::read_blocks({tokens, heads, kv_heads, dim, dim, 0.35, 10000, false, retrieval,
                                   std::move(chunks), q, k, v});
  }
};

TEST(LandmarkReference, EnoughBlocksEqualTheTrainingForward) {
  const Text text(60, 5);
  const auto marks = regular_landmarks(0, 60, 7);
  // Turned to true positions, then attention over everything.
  auto q = text.q, k = text.k;
  const auto turn = [&](std::vector<double>& x, std::int64_t heads) {
    for (std::int64_t t = 0; t < 60; ++t)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t i = 0; i < 4; ++i) {
          double* row = x.data() + (t * heads + h) * 8;
          const double angle =
              static_cast<double>(t) * std::pow(10000.0, -static_cast<double>(i) / 4);
          const double a = row[i], b = row[i + 4];
          row[i] = a * std::cos(angle) - b * std::sin(angle);
          row[i + 4] = b * std::cos(angle) + a * std::sin(angle);
        }
  };
  turn(q, 4);
  turn(k, 2);
  const auto dense = reference::parallel({60, 0, 4, 2, 8, 8, 0.35, false, q, k, text.v, marks});
  for (const std::int64_t top_k : {0, 8, 20})
    for (const std::int64_t window : {0, 1, 3}) {
      const Retrieval r{.block = 7, .top_k = top_k, .window = window};
      EXPECT_LT(distance(text.read(r, {60}).out, dense), kSame) << top_k << " " << window;
    }
  const Retrieval chunks{.block = 7, .top_k = 8, .chunked = true};
  EXPECT_LT(distance(text.read(chunks, {21, 14, 3, 4, 18}).out, dense), kSame);
}

// Keys of all tokens decide, and a block that is picked joins one softmax over tokens.
TEST(LandmarkReference, BlocksMayBeScoredByTheMeanOrTheBestOfTheirKeys) {
  Text text(60, 9);
  // A block whose keys are its queries' direction, one of them large: the best token finds it, and
  // the mean of a key and its opposite does not.
  for (std::int64_t o = 0; o < 6; ++o)
    for (std::int64_t i = 0; i < 16; ++i)
      text.k[(12 + o) * 16 + i] = (o % 2 == 0 ? 40 : -40) * (i % 8 == 0 ? 1.0 : 0.0);
  const auto picks = [&](BlockScore score) {
    return text.read({.block = 6, .top_k = 1, .score = score}, {60}).selected;
  };
  std::int64_t by_max = 0, by_mean = 0;
  const auto best = picks(BlockScore::kMax), mean = picks(BlockScore::kMean);
  for (std::size_t i = 24 * 4; i < best.size(); ++i) {  // blocks 0 to 3 are past
    by_max += best[i] == 2;
    by_mean += mean[i] == 2;
  }
  const auto queries = static_cast<std::int64_t>(best.size()) - 24 * 4;
  EXPECT_GT(by_max, queries * 9 / 10);
  EXPECT_LT(by_mean, queries / 2);

  const auto dense = text.read({.block = 6, .score = BlockScore::kMean}, {60}).out;
  for (const BlockScore score : {BlockScore::kMean, BlockScore::kMax})
    EXPECT_LT(distance(text.read({.block = 6, .top_k = 20, .score = score}, {60}).out, dense),
              kSame);
  const auto nothing = text.read({.block = 6, .top_k = -1, .score = BlockScore::kMean}, {60});
  EXPECT_GT(distance(nothing.out, dense), 1e-3);
  EXPECT_TRUE(nothing.selected.empty());
}

TEST(LandmarkReference, AWindowGivesTheSameForEveryCutAndChunksDoNot) {
  const Text text(70, 6);
  const std::vector<std::int64_t> cuts = {1, 12, 5, 30, 2, 20};
  for (const std::int64_t window : {0, 2}) {
    const Retrieval r{.block = 5, .top_k = 2, .window = window, .max_blocks = 6};
    const auto whole = text.read(r, {70}), pieces = text.read(r, cuts);
    EXPECT_EQ(whole.selected, pieces.selected);
    EXPECT_EQ(distance(whole.out, pieces.out), 0);
  }
  const Retrieval r{.block = 5, .top_k = 2, .chunked = true};
  EXPECT_GT(distance(text.read(r, {70}).out, text.read(r, cuts).out), 1e-3);
}

TEST(LandmarkReference, EqualLandmarksGiveTheYoungestBlocks) {
  Text text(48, 7);
  for (std::int64_t b = 1; b < 12; ++b)  // of the first block's landmark
    std::copy_n(text.k.begin() + 3 * 16, 16, text.k.begin() + (4 * b + 3) * 16);
  const Retrieval r{.block = 4, .top_k = 2};
  const auto selected = text.read(r, {48}).selected;
  // Those at their true distance differ; among the others, at slot 0, the youngest is tried first.
  for (std::int64_t t = 24; t < 48; ++t)
    for (std::int64_t h = 0; h < 4; ++h) {
      const std::int64_t oldest = selected[static_cast<std::size_t>((t * 4 + h) * 2)];
      EXPECT_GE(oldest, t / 4 - 4) << t;
    }
}

TEST(LandmarkParams, BadRetrievalIsRefused) {
  EXPECT_TRUE(validate(Retrieval{}).ok());
  EXPECT_FALSE(validate(Retrieval{.block = 1}).ok());
  EXPECT_TRUE(validate(Retrieval{.top_k = -1}).ok());
  EXPECT_FALSE(validate(Retrieval{.top_k = -2}).ok());
  EXPECT_FALSE(parse_block_score("median").ok());
  EXPECT_FALSE(validate(Retrieval{.window = 1, .chunked = true}).ok());
  EXPECT_FALSE(validate(Retrieval{.granularity = Granularity::kHeadMaxOverTokens}).ok());
}

}  // namespace
}  // namespace everlong::landmark
