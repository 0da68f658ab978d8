// Dilated attention on tensors: the properties of its definition, and the mistakes that are easy to
// make with it. Numbers "trap" and "property": README.md, section 6.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "mechanisms/longnet/op.h"
#include "support/compare.h"
#include "support/tolerance.h"

namespace everlong::longnet {
namespace {

using at::Tensor;
using test::relative_error;

struct Case {
  Tensor q, k, v;
};

Case random_case(std::int64_t T, std::int64_t H = 4, std::int64_t D = 8, std::int64_t B = 1,
                 at::ScalarType dtype = at::kDouble) {
  at::manual_seed(static_cast<std::uint64_t>(T * 131 + H * 7 + D));
  const auto draw = [&] { return at::randn({B, T, H, D}, at::kDouble).to(dtype); };
  return {draw(), draw(), draw()};
}

Options with(std::vector<Pattern> patterns, bool causal = true) {
  Options options;
  options.geometry.patterns = std::move(patterns);
  options.geometry.causal = causal;
  return options;
}

Tensor run(const Case& c, const Options& options) { return attention(c.q, c.k, c.v, options); }

// Plain softmax attention.
Tensor dense(const Case& c, bool causal) {
  const Tensor q = c.q.transpose(1, 2), k = c.k.transpose(1, 2), v = c.v.transpose(1, 2);
  Tensor s = at::matmul(q, k.mT()) / std::sqrt(static_cast<double>(q.size(3)));
  if (causal) s = s.masked_fill(at::ones({s.size(2), s.size(3)}, at::kBool).triu(1), -INFINITY);
  return at::matmul(at::softmax(s, -1), v).transpose(1, 2);
}

const std::vector<Pattern> kNested = {{16, 1}, {32, 2}, {64, 4}};

// Property 1.
TEST(Longnet, OnePatternOverEverythingIsSoftmaxAttention) {
  for (const bool causal : {true, false}) {
    const Case c = random_case(53);
    EXPECT_LT(relative_error(run(c, with({{64, 1}}, causal)), dense(c, causal)),
              tolerance::kFormsFloat64);
  }
}

// Property 2: what every key has twice cancels.
TEST(Longnet, APatternTwiceIsThePatternOnce) {
  const Case c = random_case(50);
  EXPECT_LT(relative_error(run(c, with({{50, 1}, {50, 1}})), run(c, with({{50, 1}}))),
            tolerance::kFormsFloat64);
}

// Property 4: nothing after a token changes it, neither its presence nor the text's length.
TEST(Longnet, OutputAtATokenDoesNotDependOnTheLength) {
  const Case c = random_case(100);
  const Tensor whole = run(c, with(kNested));
  for (const std::int64_t T : {1, 15, 16, 33, 64, 65, 99}) {
    const Case start{c.q.narrow(1, 0, T), c.k.narrow(1, 0, T), c.v.narrow(1, 0, T)};
    EXPECT_LT(relative_error(run(start, with(kNested)), whole.narrow(1, 0, T)),
              tolerance::kFormsFloat64);
  }
}

// Property 7: for one pattern, heads in the order of their offsets give the outputs in that order;
// so block and mod are the same up to a permutation.
TEST(Longnet, PermutingHeadsWithTheirOffsetsPermutesOutputs) {
  const Case c = random_case(48, 8);
  const Tensor order = at::tensor({0, 4, 1, 5, 2, 6, 3, 7}, at::kLong);  // by mod 4: 0 0 1 1 2 2 ..
  Options mod = with({{16, 4}}), block = mod;
  block.geometry.offset_rule = OffsetRule::kBlock;
  const Case moved{c.q.index_select(2, order), c.k.index_select(2, order),
                   c.v.index_select(2, order)};
  EXPECT_LT(relative_error(run(moved, block), run(c, mod).index_select(2, order)),
            tolerance::kFormsFloat64);
  EXPECT_GT(relative_error(run(c, block), run(c, mod)), 0.1);  // trap 1: they differ
}

// Property 8.
TEST(Longnet, ShiftingByTheLongestSegmentRepeatsOutputs) {
  const Case c = random_case(64);
  const auto twice = [](const Tensor& x) { return at::cat({x, x}, 1); };
  const Tensor out = run({twice(c.q), twice(c.k), twice(c.v)}, with(kNested));
  EXPECT_LT(relative_error(out.narrow(1, 64, 64), out.narrow(1, 0, 64)), tolerance::kFormsFloat64);
}

// Property 9, and trap 3 where the ratio does not divide the segment: a changed key changes exactly
// the queries that see it.
TEST(Longnet, AKeyReachesExactlyTheQueriesOnItsLattices) {
  for (const auto& patterns : {kNested, std::vector<Pattern>{{8, 1}, {20, 3}, {50, 7}}})
    for (const OffsetRule rule : {OffsetRule::kMod, OffsetRule::kBlock})
      for (const bool causal : {true, false}) {
        Options options = with(patterns, causal);
        options.geometry.offset_rule = rule;
        const Case c = random_case(71);
        const Tensor before = run(c, options);
        for (const std::int64_t j : {0, 5, 22, 40, 63}) {
          Case other{c.q, c.k.clone(), c.v.clone()};
          other.k.narrow(1, j, 1).add_(0.5);
          other.v.narrow(1, j, 1).add_(0.5);
          const Tensor changed = (run(other, options) != before).any(-1).squeeze(0);  // [T, H]
          for (std::int64_t p = 0; p < 71; ++p)
            for (std::int64_t h = 0; h < 4; ++h) {
              bool seen = false;
              for (const auto& [w, r] : patterns) {
                const std::int64_t s = rule == OffsetRule::kMod ? h % r : h / ((4 + r - 1) / r);
                seen |= p / w == j / w && p % w % r == s && j % w % r == s && (j <= p || !causal);
              }
              EXPECT_EQ(changed[p][h].item<bool>(), seen) << j << " to " << p << ", head " << h;
            }
        }
      }
}

// Property 10 and trap 4: the closed form is what literal zero rows do.
TEST(Longnet, PhantomKeysEqualLiteralZeroPadding) {
  for (const Pattern pattern : {Pattern{16, 2}, Pattern{64, 4}, Pattern{16, 1}}) {
    const Case c = random_case(37);
    Options phantom = with({pattern}, false);
    phantom.geometry.phantom = true;
    // Rows of zeros up to whole segments (of at most the text's length), then to whole ratios.
    const std::int64_t segment = std::min<std::int64_t>(pattern.segment, 37);
    const std::int64_t full = (segment + pattern.ratio - 1) / pattern.ratio * pattern.ratio;
    const std::int64_t rows = (37 + segment - 1) / segment * full;
    const auto padded = [&](const Tensor& x) {
      return at::constant_pad_nd(x, {0, 0, 0, 0, 0, rows - 37});
    };
    const Tensor literal =
        run({padded(c.q), padded(c.k), padded(c.v)}, with({{full, pattern.ratio}}, false));
    EXPECT_LT(relative_error(run(c, phantom), literal.narrow(1, 0, 37)), tolerance::kFormsFloat64);
    if (pattern.segment == 64) continue;
    EXPECT_GT(relative_error(run(c, with({pattern}, false)), run(c, phantom)), 1e-3);
  }
}

// Property 11 on tensors: autograd of the definition gives both gradients.
TEST(Longnet, GradientsEqualThoseOfTheDefinition) {
  for (const bool detached : {false, true})
    for (const bool causal : {true, false}) {
      Options options = with({{8, 1}, {20, 3}}, causal);
      options.geometry.detached = detached;
      Case c = random_case(45);
      for (Tensor* x : {&c.q, &c.k, &c.v}) x->set_requires_grad(true);
      const Tensor upstream = at::randn(c.q.sizes(), at::kDouble);
      const auto gradients = [&](const Tensor& out) {
        return torch::autograd::grad({(out * upstream).sum()}, {c.q, c.k, c.v});
      };
      const auto want = gradients(naive(c.q, c.k, c.v, options)), got = gradients(run(c, options));
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_LT(relative_error(got[i], want[i]), tolerance::kFormsFloat64);
      // The kernel in fp32, within thirty roundings of sums of 45 terms.
      Case single{c.q.detach().to(at::kFloat), c.k.detach().to(at::kFloat),
                  c.v.detach().to(at::kFloat)};
      for (Tensor* x : {&single.q, &single.k, &single.v}) x->set_requires_grad(true);
      options.path = Path::kCpu;
      const auto fast = torch::autograd::grad(
          {(run(single, options) * upstream.to(at::kFloat)).sum()}, {single.q, single.k, single.v});
      for (std::size_t i = 0; i < 3; ++i) EXPECT_LT(relative_error(fast[i], want[i]), 1e-5);
    }
}

// Property 12.
TEST(Longnet, OrderOfKeysWithinALatticeDoesNotMatterWithoutCausality) {
  const Case c = random_case(32);
  const Tensor order = at::arange(32, at::kLong).view({2, 16}).flip(1).reshape({32});
  const Options options = with({{16, 1}}, false);
  const Case moved{c.q, c.k.index_select(1, order), c.v.index_select(1, order)};
  EXPECT_LT(relative_error(run(moved, options), run(c, options)), tolerance::kFormsFloat64);
}

// Property 13.
TEST(Longnet, ConstantValuesGiveThatConstant) {
  Case c = random_case(61);
  c.v.fill_(3);
  for (const bool causal : {true, false})
    EXPECT_LT(relative_error(run(c, with({{8, 1}, {20, 3}}, causal)), c.v),
              tolerance::kFormsFloat64);
}

// Property 14 and trap 12: `grow` starts as dense attention; `fixed` never is it, and forgets all
// at the longest segment's end.
TEST(Longnet, GrowIsDenseAtFirstAndFixedForgetsAtTheCliff) {
  const Case c = random_case(70);
  Options grow = with(kNested);
  grow.geometry.beyond = Beyond::kGrow;
  const Case start{c.q.narrow(1, 0, 16), c.k.narrow(1, 0, 16), c.v.narrow(1, 0, 16)};
  EXPECT_LT(relative_error(run(c, grow).narrow(1, 0, 16), dense(start, true)),
            tolerance::kFormsFloat64);
  EXPECT_GT(relative_error(run(c, with(kNested)).narrow(1, 0, 16), dense(start, true)), 1e-2);
  for (const Options& options : {grow, with(kNested)})  // at 64 every segment begins
    EXPECT_LT(relative_error(run(c, options).narrow(1, 64, 1), c.v.narrow(1, 64, 1)),
              tolerance::kFormsFloat64);
}

// Property 16.
TEST(Longnet, HugeScoresAndZeroQueriesStayFinite) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    Case c = random_case(65, 4, 8, 1, dtype);
    const Tensor zero = run({at::zeros_like(c.q), c.k, c.v}, with(kNested));
    EXPECT_TRUE(at::isfinite(zero).all().item<bool>());
    const Tensor huge = run({c.q * 1e3, c.k, c.v}, with(kNested));
    EXPECT_TRUE(at::isfinite(huge).all().item<bool>());
    EXPECT_LT(relative_error(huge, naive(c.q.to(at::kDouble) * 1e3, c.k.to(at::kDouble),
                                         c.v.to(at::kDouble), with(kNested))),
              dtype == at::kDouble ? 1e-9 : 2e-2);  // scores of 1e4 carry 1e4 roundings
  }
}

// Trap 8: a log-sum-exp of exactly 0 is a number like any other.
TEST(Longnet, ALogSumExpOfZeroIsNotTakenForUncovered) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    Case c = random_case(20, 4, 4, 1, dtype);
    c.q.narrow(1, 0, 1).zero_();
    const Tensor out = run(c, with({{8, 1}, {16, 2}}));
    EXPECT_LT(relative_error(out.narrow(1, 0, 1), c.v.narrow(1, 0, 1)), tolerance::floor_of(dtype));
  }
}

// A row that no pattern covers is 0 and has no gradient.
TEST(Longnet, UncoveredRowsAreZero) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    Case c = random_case(32, 4, 4, 1, dtype);
    c.q.set_requires_grad(true);
    const Tensor out = run(c, with({{16, 2}, {32, 4}}));
    const Tensor grad = torch::autograd::grad({out.sum()}, {c.q})[0];
    for (std::int64_t p = 0; p < 32; ++p)
      for (std::int64_t h = 0; h < 4; ++h) {
        const bool covered = p % 16 % 2 == h % 2 || p % 4 == h;
        EXPECT_EQ(out[0][p][h].eq(0).all().item<bool>(), !covered);
        EXPECT_TRUE(covered || grad[0][p][h].eq(0).all().item<bool>());
      }
  }
}

// Trap 5: texts of several lengths beside each other, bidirectional too, are each their own.
TEST(Longnet, PackedSequencesHaveSegmentsOfTheirOwn) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    Case c = random_case(90, 4, 8, 1, dtype);
    Options options = with(kNested, false);
    options.geometry.phantom = true;
    const std::vector<std::int64_t> offsets = {0, 31, 31, 32, 90};
    c.k.narrow(1, 31, 1).fill_(NAN);  // the third text is ill; the others do not notice
    const Tensor packed = attention_packed(c.q, c.k, c.v, offsets, options);
    for (const auto& [begin, count] : {std::pair<std::int64_t, std::int64_t>{0, 31}, {32, 58}}) {
      const Case alone{c.q.narrow(1, begin, count), c.k.narrow(1, begin, count),
                       c.v.narrow(1, begin, count)};
      EXPECT_TRUE(test::same_bits(packed.narrow(1, begin, count), run(alone, options)));
    }
  }
}

// Trap 11: XPos far out, where the published form's powers overflow. The formula in fp64, pair by
// pair, for a score that depends on the distance alone.
TEST(Longnet, XposFarOutEqualsTheFormula) {
  constexpr std::int64_t kFar = 245 * 4096, T = 64, D = 8;  // on both lattices
  Options options = with({{64, 1}, {1 << 20, 4096}});
  options.xpos_base = 512;
  const Case c = random_case(T, 2, D);
  Past past;
  past.position = kFar;
  for (const Pattern& pattern : options.geometry.patterns) {
    past.k.push_back(at::randn({1, 2, pattern.rows(), D}, at::kDouble));
    past.v.push_back(at::randn({1, 2, pattern.rows(), D}, at::kDouble));
  }
  const Tensor out = attention(c.q, c.k, c.v, options, past);
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < 2; ++h) {
      std::vector<std::pair<Tensor, Tensor>> keys;  // rotated key times its fade, value
      const std::int64_t p = kFar + t;
      const auto add = [&](std::int64_t j, const Tensor& k, const Tensor& v) {
        Tensor fade = at::zeros({D}, at::kDouble);
        for (std::int64_t d = 0; d < D; ++d)
          fade[d] = std::pow((static_cast<double>(d / 2 * 2) + 0.4 * D) / (1.4 * D),
                             static_cast<double>(p - j) / 512);
        keys.emplace_back(k * fade, v);
      };
      for (std::int64_t j = 0; j <= t; ++j) add(kFar + j, c.k[0][j][h], c.v[0][j][h]);
      if (p % 4096 == h) {
        for (std::int64_t l = 0; h + l * 4096 < kFar; ++l)
          add(h + l * 4096, past.k[1][0][h][l], past.v[1][0][h][l]);
        add(p, c.k[0][t][h], c.v[0][t][h]);
      }
      std::vector<Tensor> scores, values;
      for (const auto& [k, v] : keys) {
        scores.push_back((c.q[0][t][h] * k).sum() / std::sqrt(8.0));
        values.push_back(v);
      }
      const Tensor want = at::matmul(at::softmax(at::stack(scores), 0), at::stack(values));
      EXPECT_LT(relative_error(out[0][t][h], want), 1e-11);
    }
}

// The same over a long tile in fp32: the powers are taken per block, so none overflows.
TEST(Longnet, XposStaysFiniteInSinglePrecision) {
  const Case c = random_case(40'000, 1, 4, 1, at::kFloat);
  Options options = with({{1 << 20, 16}, {64, 1}});
  options.xpos_base = 8;  // as steep as base 512 over 2.5 million tokens
  const Tensor out = run(c, options);
  EXPECT_TRUE(at::isfinite(out).all().item<bool>());
}

// Trap 16: runs on the CPU in every dtype, and says by which path.
TEST(Longnet, RunsOnTheCpuInEveryDtypeAndSaysHow) {
  const Case truth = random_case(130, 4, 24);
  const Tensor want = naive(truth.q, truth.k, truth.v, with(kNested));
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const Case c = random_case(130, 4, 24, 1, dtype);
    const double allowed = dtype == at::kDouble  ? 1e-12
                           : dtype == at::kFloat ? 4e-6
                                                 : tolerance::floor_of(at::kBFloat16);
    EXPECT_LT(relative_error(run(c, with(kNested)), want), allowed) << dtype;
    const bool kernel = dtype == at::kFloat || dtype == at::kBFloat16;
    EXPECT_EQ(path_taken(c.q, c.k, c.v, with(kNested)), kernel ? "cpu" : "composite");
  }
  Options only = with(kNested);
  only.path = Path::kCpu;
  EXPECT_THROW(run(truth, only), c10::Error);
}

// Head dims of the published models.
TEST(Longnet, EveryPublishedHeadDimRuns) {
  for (const std::int64_t dim : {16, 24, 32, 48, 64, 96, 128}) {
    const Case c = random_case(70, 2, dim, 2, at::kFloat);
    const Tensor want =
        naive(c.q.to(at::kDouble), c.k.to(at::kDouble), c.v.to(at::kDouble), with(kNested, false));
    EXPECT_LT(relative_error(run(c, with(kNested, false)), want), 4e-6) << dim;
  }
}

// Trap 18: every head is written, also where the numbers of heads and patterns have no common
// factor.
TEST(Longnet, EveryHeadIsWritten) {
  const Case c = random_case(200, 12, 8);
  const Tensor out = run(c, with({{8, 1}, {16, 2}, {32, 4}, {64, 6}, {128, 12}}));
  EXPECT_TRUE(out.ne(0).any(-1).all().item<bool>());
}

TEST(Longnet, GatherLeavesStridedInputsWhereTheyLie) {
  // q, k, v as slices of one packed projection.
  const Case c = random_case(90, 4, 8);
  const Tensor packed = at::stack({c.q, c.k, c.v}, 2);
  const Case slices{packed.select(2, 0), packed.select(2, 1), packed.select(2, 2)};
  EXPECT_TRUE(test::same_bits(run(slices, with(kNested)), run(c, with(kNested))));
}

}  // namespace
}  // namespace everlong::longnet
