#include "kernels/cpu/softmax_block_test.h"

#include <gtest/gtest.h>

#include "core/text.h"

namespace everlong::cpu {
namespace {

double largest(const Numbers& x) {
  double most = 0;
  for (const double value : x)
    if (std::isfinite(value)) most = std::max(most, std::abs(value));
  return most;
}

// `got` against `want` where `want` is a number, and the same infinities.
void expect_near(const Numbers& got, const Numbers& want, double tolerance, const char* what) {
  ASSERT_EQ(got.size(), want.size());
  const double allowed = tolerance * (1 + largest(want));
  for (std::size_t i = 0; i < want.size(); ++i)
    ASSERT_TRUE(got[i] == want[i] || std::abs(got[i] - want[i]) <= allowed)
        << what << "[" << i << "] = " << got[i] << ", not " << want[i];
}

// fp32: scores of size 1 to 10 carry 1e-6, sums of 300 terms some of those; dP - delta cancels
// terms of size 10. bf16: outputs rounded to 2^-9, delta made from the rounded o.
double tolerance_of(DType dtype) { return dtype == DType::kBFloat16 ? 1.2e-2 : 3e-5; }

void compare(const Values& got, const Values& want, double tolerance) {
  expect_near(got.o, want.o, tolerance, "o");
  expect_near(got.lse, want.lse, 2e-6, "lse");
  expect_near(got.dq, want.dq, tolerance, "dq");
  expect_near(got.dk, want.dk, tolerance, "dk");
  expect_near(got.dv, want.dv, tolerance, "dv");
}

enum class Mask { kAll, kCausal, kWindow, kDocuments, kAny };

// Row r stands at key keys - rows + r: earlier rows than keys see nothing.
void set_sight(Case& c, Mask mask, Random& random) {
  std::uniform_int_distribution<std::int64_t> any(-5, c.keys + 5);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const std::int64_t own = c.keys - c.rows + r;
    std::int64_t begin = 0, end = mask == Mask::kAll ? c.keys : own + 1;
    if (mask == Mask::kWindow) begin = own - 6;
    if (mask == Mask::kDocuments) begin = own / 40 * 40;
    if (mask == Mask::kAny) begin = any(random), end = any(random);
    c.begin.push_back(begin);
    c.end.push_back(end);
  }
}

void set_bias(Case& c, Random& random) {
  std::uniform_int_distribution<int> count(0, 4);
  for (std::int64_t j = 0; j < c.keys; ++j)  // multiplicities; 0 hides the key
    c.bias.push_back(std::log(static_cast<float>(count(random))));
}

TEST(SoftmaxBlock, EqualsTheDefinitionForwardAndBackward) {
  on_every_target([] {
    Random random(1);
    int number = 0;
    for (const int key_dim : {1, 8, 16, 24, 33, 64, 80, 128, 256})
      for (const Mask mask :
           {Mask::kAll, Mask::kCausal, Mask::kWindow, Mask::kDocuments, Mask::kAny}) {
        constexpr std::int64_t kRows[] = {96, 1, 17, 4, 50, 12, 3, 90},
                               kKeys[] = {97, 1, 250, 96, 30, 191, 64};
        constexpr int kValueDims[] = {64, 8, 20, 128, 256, 1};
        Case c{.rows = kRows[number % 8],
               .keys = kKeys[number % 7],
               .key_dim = key_dim,
               .value_dim = kValueDims[number % 6]};
        c.dtype = number % 5 == 4 ? DType::kBFloat16 : DType::kFloat32;
        c.group = number % 3 == 2 && c.rows % 3 == 0 ? 3 : 1;
        c.scale = 1 / std::sqrt(key_dim);
        set_sight(c, mask, random);
        if (number % 4 == 1) set_bias(c, random);
        ++number;
        SCOPED_TRACE(cat("rows ", c.rows, " keys ", c.keys, " dims ", c.key_dim, " ", c.value_dim,
                         " mask ", static_cast<int>(mask), c.bias.empty() ? "" : " bias"));
        Trial run(c, random);
        compare(run.block(), run.definition(), tolerance_of(c.dtype));
        if (::testing::Test::HasFatalFailure()) return;
      }
  });
}

TEST(SoftmaxBlock, ScoresOfAnySizeKeepTheirAccuracy) {
  on_every_target([] {
    Random random(2);
    for (const double scale : {1e-4, 3.0, 30.0}) {
      Case c{.rows = 40, .keys = 130, .key_dim = 32, .value_dim = 16, .scale = scale};
      set_sight(c, Mask::kCausal, random);
      Trial run(c, random);
      const Values got = run.block(), want = run.definition();
      // Scores of 17 * scale are off by their ulp, and so are the logarithms of probabilities.
      expect_near(got.o, want.o, 5e-6 * (1 + 17 * scale), "o");
      expect_near(got.dv, want.dv, 5e-6 * (1 + 17 * scale), "dv");
    }
  });
}

TEST(SoftmaxBlock, WeightsAreRightToAFewUlps) {
  on_every_target([] {
    for (const std::int64_t rows : {1, 30}) {
      Case c{.rows = rows, .keys = 2, .key_dim = 1, .value_dim = 1, .scale = 1};
      c.begin.assign(static_cast<std::size_t>(rows), 0);
      c.end.assign(static_cast<std::size_t>(rows), 2);
      Random random(8);
      Trial run(c, random);
      run.k.set(0, 0, 1), run.k.set(1, 0, 0);
      run.v.set(0, 0, 1), run.v.set(1, 0, 0);
      for (double s = -80; s < 0; s += 0.37) {
        for (std::int64_t r = 0; r < rows; ++r) run.q.set(r, 0, s);
        const double score = run.q.get(0, 0), weight = std::exp(score) / (1 + std::exp(score));
        Store o(rows, 1, DType::kFloat32), lse(rows, 1, DType::kFloat32);
        run.forward(o, lse, 0, 2, 2);
        // Three roundings, and the score's own: it is multiplied by log2(e).
        EXPECT_NEAR(o.get(0, 0) / weight, 1, 6e-8 * (4 - 2 * score)) << score;
      }
    }
  });
}

TEST(SoftmaxBlock, RowsThatSeeNothingAreZeroAndHaveNoGradient) {
  on_every_target([] {
    for (const std::int64_t rows : {3, 40}) {
      Random random(3);
      Case c{.rows = rows, .keys = 100, .key_dim = 16, .value_dim = 24};
      set_sight(c, Mask::kCausal, random);
      c.end[1] = c.begin[1];
      Case hidden = c;
      hidden.bias.assign(100, -std::numeric_limits<float>::infinity());
      Trial run(c, random), none(hidden, random);
      const Values got = run.block(), nothing = none.block();
      for (int d = 0; d < 24; ++d) EXPECT_EQ(got.o[static_cast<std::size_t>(24 + d)], 0);
      for (int d = 0; d < 16; ++d) EXPECT_EQ(got.dq[static_cast<std::size_t>(16 + d)], 0);
      EXPECT_EQ(got.lse[1], -kInfinity);
      for (const Numbers* x : {&nothing.o, &nothing.dq, &nothing.dk, &nothing.dv})
        EXPECT_TRUE(std::ranges::all_of(*x, [](double value) { return value == 0; }));
      EXPECT_TRUE(std::ranges::all_of(nothing.lse, [](double x) { return x == -kInfinity; }));
    }
  });
}

TEST(SoftmaxBlock, PartsMakeTheWhole) {
  on_every_target([] {
    for (const std::int64_t rows : {2, 30})
      for (const std::int64_t cut : {0, 1, 77, 96, 200}) {
        Random random(4);
        Case c{.rows = rows, .keys = 200, .key_dim = 24, .value_dim = 40, .scale = 1};
        set_sight(c, Mask::kCausal, random);
        c.end[0] = c.begin[0];
        Trial run(c, random);
        const auto store = [&](std::int64_t dim) { return Store(rows, dim, DType::kFloat32); };
        Store o = store(40), lse = store(1), a = store(40), a_lse = store(1), b = store(40),
              b_lse = store(1), on = store(40), on_lse = store(1);
        run.forward(o, lse, 0, cut, 200);
        const Values want = run.definition();
        expect_near(Trial::numbers(o), want.o, 5e-6, "two calls");
        run.forward(a, a_lse, 0, cut, cut);
        run.forward(b, b_lse, cut, 200, 200);

        auto memory = Trial::scratch<SoftmaxForward>(c);
        SoftmaxForward block(run.shape(), memory.get());
        block.begin(run.q.view(), static_cast<int>(rows));
        for (int again = 0; again < 2; ++again) {
          block.restart();
          block.resume(a.view(), a_lse.view());
          const auto [begin, end] = run.sight(cut);
          block.absorb(run.keys(cut, 200 - cut), {begin.data(), end.data()});
        }
        block.finish(on.view(), on_lse.view());
        expect_near(Trial::numbers(on), want.o, 5e-6, "resumed");
        expect_near(Trial::numbers(on_lse), want.lse, 2e-6, "resumed lse");

        softmax_merge(a.view(), a_lse.view(), b.view(), b_lse.view(), static_cast<int>(rows), 40);
        expect_near(Trial::numbers(a), want.o, 5e-6, "merged");
        expect_near(Trial::numbers(a_lse), want.lse, 2e-6, "merged lse");
      }
  });
}

// What a landmark gate is made of: a block whose weight is another number than its own sum.
TEST(SoftmaxBlock, AGateWeighsABlockByItsOwnScore) {
  Random random(5);
  Case c{.rows = 10, .keys = 60, .key_dim = 16, .value_dim = 8};
  c.begin.assign(10, 0), c.end.assign(10, 60);
  Trial run(c, random);
  const auto part = [&](std::int64_t from, std::int64_t to) {
    std::pair<Store, Store> out{Store(10, 8, DType::kFloat32), Store(10, 1, DType::kFloat32)};
    run.forward(out.first, out.second, from, to, to);
    return out;
  };
  auto [own, own_lse] = part(0, 20);
  auto [past, past_lse] = part(20, 60);
  const Numbers o = Trial::numbers(own), past_o = Trial::numbers(past),
                lse = Trial::numbers(own_lse);
  Store gate(10, 1, DType::kFloat32);
  for (int r = 0; r < 10; ++r) gate.set(r, 0, 0.5 * r);
  softmax_merge(own.view(), own_lse.view(), past.view(), gate.view(), 10, 8);
  for (std::int64_t r = 0; r < 10; ++r) {
    const double z = 0.5 * static_cast<double>(r), mine = lse[static_cast<std::size_t>(r)];
    const double share = std::exp(z) / (std::exp(z) + std::exp(mine));
    for (std::int64_t d = 0; d < 8; ++d) {
      const auto i = static_cast<std::size_t>(r * 8 + d);
      EXPECT_NEAR(own.get(r, d), (1 - share) * o[i] + share * past_o[i], 1e-6);
    }
  }
}

// A broken query, key, value or gradient reaches only the rows and keys that see each other.
TEST(SoftmaxBlock, NanStaysWhereItIsSeen) {
  on_every_target([] {
    for (const std::int64_t rows : {4, 60})
      for (const int bias : {0, 1, 2})  // none; some keys hidden; the sick one too
        for (int sick = 0; sick < 4; ++sick) {
          Random random(6);
          Case c{.rows = rows, .keys = 150, .key_dim = 24, .value_dim = 40};
          set_sight(c, Mask::kWindow, random);
          if (bias > 0) set_bias(c, random);
          Trial run(c, random);
          const std::int64_t row = rows / 2, key = c.keys - rows / 2 - 2;
          if (bias == 2) c.bias[static_cast<std::size_t>(key)] = static_cast<float>(-kInfinity);
          const Values want = run.definition();
          Store* const inputs[] = {&run.q, &run.go, &run.k, &run.v};
          inputs[sick]->set(sick < 2 ? row : key, 3, sick % 2 == 0 ? kNan : kInfinity);
          const Values got = run.block();
          const auto check = [&](const Numbers& a, const Numbers& b, std::int64_t count,
                                 const auto& touched) {
            const auto dim = static_cast<std::int64_t>(a.size()) / count;
            for (std::int64_t i = 0; i < static_cast<std::int64_t>(a.size()); ++i)
              if (!touched(i / dim)) {
                const auto at = static_cast<std::size_t>(i);
                ASSERT_TRUE(a[at] == b[at] || std::abs(a[at] - b[at]) < 1e-4)
                    << "sick " << sick << " at " << i / dim << ": " << a[at] << ", not " << b[at];
              }
          };
          const auto row_touched = [&](std::int64_t r) {
            return sick < 2 ? r == row : run.sees(r, key);
          };
          const auto key_touched = [&](std::int64_t j) {
            if (sick < 2) return run.sees(row, j);
            for (std::int64_t r = 0; r < rows; ++r)
              if (run.sees(r, key) && run.sees(r, j)) return true;
            return j == key;
          };
          check(got.o, want.o, rows, row_touched);
          check(got.dq, want.dq, rows, row_touched);
          check(got.dk, want.dk, c.keys, key_touched);
          check(got.dv, want.dv, c.keys, key_touched);
          if (sick == 1) continue;
          bool seen = false;
          for (std::int64_t r = 0; r < rows; ++r) {
            if (sick == 0 ? r != row : !run.sees(r, key)) continue;
            const auto at = static_cast<std::size_t>(r * c.value_dim + 3);
            if (std::isfinite(want.lse[static_cast<std::size_t>(r)])) {
              EXPECT_FALSE(std::isfinite(got.o[at]));
            }
            seen = true;
          }
          EXPECT_TRUE(seen || bias > 0);
        }
  });
}

}  // namespace
}  // namespace everlong::cpu
