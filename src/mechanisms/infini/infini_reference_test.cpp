#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "mechanisms/infini/reference.h"

namespace everlong::infini::reference {
namespace {

using Vector = std::vector<double>;
using Form = Answer (*)(const Problem&);

// Rounding of sums in other orders, over values of size 1; any wrong token shows at 1e-4 or more.
constexpr double kForms = 1e-12;

struct Case {
  std::int64_t tokens = 29, open = 0, heads = 2, kv_heads = 2, key_dim = 8, value_dim = 6;
  std::int64_t segment = 8;
  bool state = false, weights = false, commit_last = false;
  Update update = Update::kLinear;
  DeltaZ delta_z = DeltaZ::kPaper;
  Empty empty = Empty::kBypass;
  Rope rope = Rope::kHalfSplit;
  double key_size = 1;
};

Vector draw(std::mt19937_64& random, std::int64_t count, double size = 1) {
  std::normal_distribution<double> normal(0, size);
  Vector out(static_cast<std::size_t>(count));
  for (double& x : out) x = normal(random);
  return out;
}

Problem make(const Case& c, std::uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  Problem p;
  p.tokens = c.tokens;
  p.open = c.open;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.key_dim = c.key_dim;
  p.value_dim = c.value_dim;
  p.options.segment = c.segment;
  p.options.update = c.update;
  p.options.delta_z = c.delta_z;
  p.options.empty = c.empty;
  p.options.rope = c.rope;
  p.options.commit_last = c.commit_last;
  p.q = draw(random, c.tokens * c.heads * c.key_dim);
  p.k = draw(random, p.rows() * c.kv_heads * c.key_dim, c.key_size);
  p.v = draw(random, p.rows() * c.kv_heads * c.value_dim);
  p.weight.assign(static_cast<std::size_t>(p.rows()), 1);
  if (c.weights)
    for (std::size_t i = 0; i < p.weight.size(); ++i)
      p.weight[i] = i % 3 == 1 ? 0.0 : 0.5 + 0.1 * i;
  p.gate = draw(random, c.heads * c.value_dim);
  for (double& g : p.gate) g = 1 / (1 + std::exp(-g));
  p.M.assign(static_cast<std::size_t>(c.kv_heads * c.key_dim * c.value_dim), 0);
  p.z.assign(static_cast<std::size_t>(c.kv_heads * c.key_dim), 0);
  if (c.state) {
    p.M = draw(random, static_cast<std::int64_t>(p.M.size()), 3);
    for (double& z : p.z) z = 2 + std::uniform_real_distribution<double>()(random);
  }
  return p;
}

double error(const Vector& a, const Vector& b) {
  double worst = 0, largest = 1e-300;
  for (std::size_t i = 0; i < b.size(); ++i) {
    worst = std::max(worst, std::abs(a.at(i) - b[i]));
    largest = std::max(largest, std::abs(b[i]));
    if (!std::isfinite(a[i])) return INFINITY;
  }
  return worst / largest;
}

std::vector<Case> cases() {
  std::vector<Case> list;
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    list.push_back({.update = update});
    list.push_back({.tokens = 24, .update = update, .empty = Empty::kZero, .rope = Rope::kNone});
    list.push_back({.tokens = 13,
                    .open = 5,
                    .heads = 4,
                    .kv_heads = 2,
                    .state = true,
                    .commit_last = true,
                    .update = update,
                    .rope = Rope::kInterleaved});
    list.push_back(
        {.tokens = 40, .heads = 3, .kv_heads = 1, .segment = 5, .weights = true, .update = update});
    list.push_back({.tokens = 3, .open = 4, .state = true, .update = update});
    list.push_back({.tokens = 9,
                    .key_dim = 1,
                    .value_dim = 1,
                    .segment = 1,
                    .update = update,
                    .rope = Rope::kNone});
  }
  list.push_back({.tokens = 37,
                  .state = true,
                  .weights = true,
                  .update = Update::kDelta,
                  .delta_z = DeltaZ::kArmt});
  return list;
}

TEST(InfiniReference, FourFormsAgree) {
  for (const Case& c : cases()) {
    const Problem p = make(c);
    const Answer one = stream(p);
    for (const Form form : {scan, slots, explicit_pairs}) {
      const Answer other = form(p);
      EXPECT_LE(error(other.out, one.out), kForms) << c.tokens << " tokens";
      EXPECT_LE(error(other.M, one.M), kForms) << c.tokens << " tokens";
      EXPECT_LE(error(other.z, one.z), kForms) << c.tokens << " tokens";
    }
  }
}

TEST(InfiniReference, FormsAgreeOverManyAndLongSegmentsAndExtremeKeys) {
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    for (const auto& [segment, count] :
         {std::pair<std::int64_t, std::int64_t>{4, 17}, {16, 5}, {64, 2}}) {
      const Problem p = make(
          {.tokens = segment * count - 3, .key_dim = 16, .segment = segment, .update = update});
      const Answer one = stream(p);
      for (const Form form : {scan, slots, explicit_pairs})
        EXPECT_LE(error(form(p).out, one.out), kForms) << segment << " x " << count;
    }
    // Keys of +-20: features of 21 and 2e-9 beside each other; ten digits less of every sum.
    Problem p = make({.tokens = 32, .update = update});
    for (double& k : p.k) k = k > 0 ? 20 : -20;
    const Answer one = stream(p);
    for (const Form form : {scan, slots, explicit_pairs})
      EXPECT_LE(error(form(p).out, one.out), 1e-9);
  }
}

TEST(InfiniReference, GradientsEqualFiniteDifferences) {
  for (const Case& c : cases()) {
    if (c.delta_z == DeltaZ::kArmt) continue;  // gamma is held constant, which no difference does
    Problem p = make(c);
    std::mt19937_64 random(7);
    const Vector go = draw(random, p.tokens * p.heads * p.value_dim),
                 gM = draw(random, static_cast<std::int64_t>(p.M.size())),
                 gz = draw(random, static_cast<std::int64_t>(p.z.size()));
    const Gradients d = gradients(p, go, gM, gz);
    const auto loss = [&](const Problem& at) {
      const Answer a = stream(at);
      double sum = 0;
      for (std::size_t i = 0; i < go.size(); ++i) sum += go[i] * a.out[i];
      for (std::size_t i = 0; i < gM.size(); ++i) sum += gM[i] * a.M[i];
      for (std::size_t i = 0; i < gz.size(); ++i) sum += gz[i] * a.z[i];
      return sum;
    };
    const auto check = [&](const char* name, Vector Problem::*member, const Vector& gradient) {
      const Vector direction = draw(random, static_cast<std::int64_t>(gradient.size()));
      constexpr double kStep = 1e-4;
      Problem up = p, down = p;
      double exact = 0, norm = 0;
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        (up.*member)[i] += kStep * direction[i];
        (down.*member)[i] -= kStep * direction[i];
        exact += gradient[i] * direction[i];
        norm += gradient[i] * gradient[i];
      }
      const double numeric = (loss(up) - loss(down)) / (2 * kStep);
      EXPECT_NEAR(numeric, exact, 1e-6 * std::max({std::abs(numeric), std::sqrt(norm), 1e-3}))
          << name << ", " << c.tokens << " tokens";
    };
    check("q", &Problem::q, d.q);
    check("k", &Problem::k, d.k);
    check("v", &Problem::v, d.v);
    check("gate", &Problem::gate, d.gate);
    if (!c.state) continue;  // an empty memory is a convention, not a limit
    check("M", &Problem::M, d.M);
    check("z", &Problem::z, d.z);
  }
}

TEST(InfiniReference, PiecesEqualTheWhole) {
  for (const Case& c : cases()) {
    if (c.commit_last) continue;  // closes at every call, as it says
    const Problem p = make(c);
    const Answer whole = stream(p);
    for (const std::int64_t cut : {std::int64_t{1}, c.tokens / 2, c.tokens - 1}) {
      Problem first = p, second = p;
      const std::int64_t C = c.segment, end = p.open + cut, keep = end / C * C;
      first.tokens = cut;
      const Answer a = stream(first);
      second.tokens = p.tokens - cut;
      second.open = end - keep;
      const auto drop = [](Vector& x, std::int64_t count) {
        x.erase(x.begin(), x.begin() + count);
      };
      drop(second.q, cut * p.heads * p.key_dim);
      drop(second.k, keep * p.kv_heads * p.key_dim);
      drop(second.v, keep * p.kv_heads * p.value_dim);
      drop(second.weight, keep);
      second.M = a.M;
      second.z = a.z;
      const Answer b = stream(second);
      const Vector tail(whole.out.begin() + cut * p.heads * p.value_dim, whole.out.end());
      EXPECT_LE(error(b.out, tail), kForms) << cut << " of " << c.tokens;
      EXPECT_LE(error(b.M, whole.M), kForms) << cut << " of " << c.tokens;
    }
  }
}

TEST(InfiniReference, SigmaIsPositiveMonotoneAndAccurate) {
  double before = 0;
  for (double x = -80; x <= 40; x += 0.25) {
    EXPECT_GT(sigma(x), before) << x;
    before = sigma(x);
  }
  EXPECT_NEAR(sigma(-14), 8.3152871910356788e-7, 1e-20);
}

// Orthonormal keys with identity features: retrieval is exact, and the delta rule's treatment of a
// repeated binding shows.
Answer repeated(Update update, const std::vector<double>& values) {
  Problem p = make({.tokens = static_cast<std::int64_t>(values.size()) + 1,
                    .heads = 1,
                    .kv_heads = 1,
                    .key_dim = 2,
                    .value_dim = 1,
                    .segment = 1,
                    .update = update,
                    .rope = Rope::kNone});
  p.feature = [](double x) { return x; };
  p.gate = {1};
  for (std::size_t t = 0; t <= values.size(); ++t) {
    p.q[2 * t] = p.k[2 * t] = 1;
    p.q[2 * t + 1] = p.k[2 * t + 1] = 0;
    p.v[t] = t < values.size() ? values[t] : 0;
  }
  p.options.empty = Empty::kZero;
  return stream(p);
}

TEST(InfiniReference, ARepeatedBindingIsAveragedByTheLinearRuleAndHalvedByTheDeltaRule) {
  EXPECT_NEAR(repeated(Update::kLinear, {3, 5}).out[2], 4, 1e-12);
  EXPECT_NEAR(repeated(Update::kDelta, {3, 5}).out[2], 2.5, 1e-12);  // 5 / 2, the 3 is gone
  const Answer constant = repeated(Update::kDelta, {1, 1, 1, 1});
  EXPECT_NEAR(constant.out[1], 1, 1e-12);
  for (const std::size_t t : {2, 3, 4}) EXPECT_NEAR(constant.out[t], 0.5, 1e-12);
}

TEST(InfiniReference, KeysWrittenOnceAreReadBackExactly) {
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    constexpr std::int64_t kKeys = 5;
    Problem p = make({.tokens = 2 * kKeys,
                      .heads = 1,
                      .kv_heads = 1,
                      .key_dim = kKeys,
                      .segment = kKeys,
                      .update = update,
                      .rope = Rope::kNone});
    p.feature = [](double x) { return x; };
    p.gate.assign(p.gate.size(), 1);
    for (std::int64_t t = 0; t < 2 * kKeys; ++t)
      for (std::int64_t i = 0; i < kKeys; ++i)
        p.q[t * kKeys + i] = p.k[t * kKeys + i] = t % kKeys == i ? 1 : 0;
    const Answer a = stream(p);
    for (std::int64_t i = 0; i < kKeys * p.value_dim; ++i)
      EXPECT_NEAR(a.out[kKeys * p.value_dim + i], p.v[i], 1e-12);
  }
}

TEST(InfiniReference, ConstantValuesComeBackAndMeansStayWithinTheValues) {
  Problem p = make({.tokens = 60, .key_size = 3});
  p.gate.assign(p.gate.size(), 1);
  Problem constant = p;
  std::ranges::fill(constant.v, 1.75);
  for (const double o : stream(constant).out) EXPECT_NEAR(o, 1.75, 1e-13);
  const Answer a = stream(p);
  const auto [low, high] = std::ranges::minmax_element(p.v);
  for (const double o : a.out) {
    EXPECT_GE(o, *low - 1e-12);
    EXPECT_LE(o, *high + 1e-12);
  }
}

TEST(InfiniReference, AScaledHistoryReadsTheSameAndASegmentCanBeTakenBack) {
  Problem p = make({.tokens = 5, .state = true});
  const Answer before = stream(p);
  Problem scaled = p;
  for (double& x : scaled.M) x *= 37;
  for (double& x : scaled.z) x *= 37;
  EXPECT_LE(error(stream(scaled).out, before.out), kForms);

  // What a segment wrote is a sum of its own: taking it away leaves what the others wrote.
  const auto memory_of = [](std::vector<std::uint64_t> seeds) {
    Vector M, z;
    for (const std::uint64_t seed : seeds) {
      Problem one = make({.tokens = 8, .commit_last = true}, seed);
      if (!M.empty()) {
        one.M = M;
        one.z = z;
      }
      const Answer a = stream(one);
      M = a.M;
      z = a.z;
    }
    return std::pair(M, z);
  };
  auto [M, z] = memory_of({1, 2, 3});
  const auto [M2, z2] = memory_of({2});
  const auto [M13, z13] = memory_of({1, 3});
  for (std::size_t i = 0; i < M.size(); ++i) M[i] -= M2[i];
  for (std::size_t i = 0; i < z.size(); ++i) z[i] -= z2[i];
  EXPECT_LE(error(M, M13), kForms);
  EXPECT_LE(error(z, z13), kForms);
}

TEST(InfiniReference, TheOrderInsideASegmentDoesNotMatterToMemory) {
  const Problem p = make({.tokens = 8, .rope = Rope::kInterleaved});
  Problem reversed = p;
  const auto width_k = p.kv_heads * p.key_dim, width_v = p.kv_heads * p.value_dim;
  for (std::int64_t t = 0; t < 8; ++t) {
    std::copy_n(p.k.begin() + t * width_k, width_k, reversed.k.begin() + (7 - t) * width_k);
    std::copy_n(p.v.begin() + t * width_v, width_v, reversed.v.begin() + (7 - t) * width_v);
  }
  EXPECT_LE(error(stream(reversed).M, stream(p).M), kForms);
  EXPECT_GT(error(stream(reversed).out, stream(p).out), 0.01);
}

TEST(InfiniReference, AClosedGateIsLocalAttentionAndAnOpenOneIsMemory) {
  Problem p = make({.tokens = 20});
  Problem wrong = p;
  std::ranges::fill(p.gate, 0);
  std::ranges::fill(p.M, 5);  // an empty z makes it empty whatever M holds
  Problem local = p;
  local.options.empty = Empty::kZero;
  EXPECT_LE(error(stream(p).out, stream(local).out), kForms);
  std::ranges::fill(wrong.gate, 1);
  const Answer memory = stream(wrong);
  const auto first = static_cast<std::ptrdiff_t>(8 * p.heads * p.value_dim);
  EXPECT_LE(error(Vector(memory.out.begin(), memory.out.begin() + first),
                  [&] {
                    const Vector all = stream(p).out;
                    return Vector(all.begin(), all.begin() + first);
                  }()),
            kForms);  // segment 1 is local under bypass
}

TEST(InfiniReference, ATokenOfWeightZeroNeverReachesMemory) {
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    Problem p = make({.tokens = 24, .weights = true, .update = update});
    Problem other = p;
    for (std::int64_t row = 0; row < 24; ++row)
      for (std::int64_t i = 0; i < p.kv_heads * p.key_dim && p.weight[row] == 0; ++i)
        other.k[row * p.kv_heads * p.key_dim + i] = std::nan("");
    EXPECT_EQ(stream(p).M, stream(other).M);
    EXPECT_EQ(stream(p).z, stream(other).z);
  }
}

TEST(InfiniReference, GradientsEndWhereTheyAreCut) {
  Problem p = make({.tokens = 40, .state = true});
  const Vector go(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim), 1);
  const auto reaches = [&](std::int64_t every) {
    p.options.bptt_segments = every;
    return gradients(p, go, {}, {});
  };
  const auto moved = [&](const Gradients& d, std::int64_t segment) {  // v reaches later segments
    Problem local = p;
    local.options.bptt_segments = 1;
    const Vector own = gradients(local, go, {}, {}).v;
    const std::int64_t width = 8 * p.kv_heads * p.value_dim;
    double difference = 0;
    for (std::int64_t i = segment * width; i < (segment + 1) * width; ++i)
      difference = std::max(difference, std::abs(d.v[i] - own[i]));
    return difference > 1e-6;
  };
  const Gradients all = reaches(0), two = reaches(2), three = reaches(3);
  for (const std::int64_t s : {0, 1, 2, 3}) EXPECT_TRUE(moved(all, s)) << s;
  // Cut before segments 2 and 4: segment 1 and 3 reach nobody.
  EXPECT_TRUE(moved(two, 0));
  EXPECT_FALSE(moved(two, 1));
  EXPECT_TRUE(moved(two, 2));
  EXPECT_FALSE(moved(two, 3));
  EXPECT_TRUE(moved(three, 1));
  EXPECT_FALSE(moved(three, 2));
}

}  // namespace
}  // namespace everlong::infini::reference
