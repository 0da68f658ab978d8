#include "mechanisms/lightning/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "support/tolerance.h"

namespace everlong::lightning {
namespace {

using reference::Gradient;
using reference::Input;
using reference::Output;
using Values = std::vector<double>;

// A random problem that owns its arrays.
struct Case {
  Shape shape;
  std::vector<std::int64_t> offsets;
  Values q, k, v, slope, state, grad_o, grad_state;
  double scale = 0.7;

  Input input() const {
    Input in{.shape = shape,
             .q_BTHK = q,
             .k_BTHK = k,
             .v_BTHV = v,
             .slope_H = slope,
             .scale = scale,
             .state_NHKV = state};
    in.shape.cu_seqlens = offsets;
    return in;
  }
};

struct Wanted {
  std::int64_t batch = 1, tokens = 5, key_dim = 3, value_dim = 2;
  Values slope = {0.84, 1e-5};
  std::vector<std::int64_t> offsets = {};
  bool state = true;
};

Case random_case(const Wanted& wanted, unsigned seed = 1) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  const auto draw = [&](std::int64_t count) {
    Values out(static_cast<std::size_t>(count));
    for (double& x : out) x = normal(generator);
    return out;
  };
  Case c;
  c.offsets = wanted.offsets;
  c.slope = wanted.slope;
  c.shape = {.batch = wanted.batch,
             .tokens = wanted.offsets.empty() ? wanted.tokens : wanted.offsets.back(),
             .heads = static_cast<std::int64_t>(wanted.slope.size()),
             .key_dim = wanted.key_dim,
             .value_dim = wanted.value_dim,
             .cu_seqlens = {}};
  const std::int64_t rows = c.shape.batch * c.shape.tokens * c.shape.heads;
  const std::int64_t sequences = c.input().shape.sequences();
  const std::int64_t states = sequences * c.shape.heads * wanted.key_dim * wanted.value_dim;
  c.q = draw(rows * wanted.key_dim);
  c.k = draw(rows * wanted.key_dim);
  c.v = draw(rows * wanted.value_dim);
  if (wanted.state) c.state = draw(states);
  c.grad_o = draw(rows * wanted.value_dim);
  c.grad_state = draw(states);
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const std::int64_t tokens : {0, 1, 2, 15, 63, 64, 65, 130})
    out.push_back(random_case({.batch = 2, .tokens = tokens, .key_dim = 4, .value_dim = 6}));
  out.push_back(random_case({.tokens = 65,
                             .key_dim = 6,
                             .value_dim = 3,
                             .slope = {8, 0.917, 0.1, 3.9e-3, 1e-5, 4e-8, 0, 80}}));
  out.push_back(random_case({.tokens = 33, .state = false}));
  out.push_back(random_case({.offsets = {0, 0, 40, 41, 41, 63, 63}}));
  out.push_back(random_case({.offsets = {0, 7}, .state = false}));
  return out;
}

double error(const Values& actual, const Values& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double worst = 0, size = 1e-300;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    worst = std::max(worst, std::abs(actual[i] - expected[i]));
    size = std::max(size, std::abs(expected[i]));
    if (std::isnan(actual[i])) return INFINITY;
  }
  return worst / size;
}

void expect_same(const Result<Output>& actual, const Result<Output>& expected,
                 const std::string& what) {
  ASSERT_TRUE(actual.ok()) << actual.status().message();
  EXPECT_LE(error(actual->o_BTHV, expected->o_BTHV), tolerance::kFormsFloat64) << what << ": o";
  EXPECT_LE(error(actual->state_NHKV, expected->state_NHKV), tolerance::kFormsFloat64)
      << what << ": state";
}
void expect_same(const Result<Gradient>& actual, const Result<Gradient>& expected,
                 const std::string& what) {
  ASSERT_TRUE(actual.ok()) << actual.status().message();
  EXPECT_LE(error(actual->q_BTHK, expected->q_BTHK), tolerance::kFormsFloat64) << what << ": dq";
  EXPECT_LE(error(actual->k_BTHK, expected->k_BTHK), tolerance::kFormsFloat64) << what << ": dk";
  EXPECT_LE(error(actual->v_BTHV, expected->v_BTHV), tolerance::kFormsFloat64) << what << ": dv";
  EXPECT_LE(error(actual->state_NHKV, expected->state_NHKV), tolerance::kFormsFloat64)
      << what << ": dstate";
}

TEST(LightningReference, FormsAgree) {
  for (const Case& c : cases()) {
    const Input in = c.input();
    const auto expected = reference::recurrent(in);
    const std::string tokens = cat(c.shape.tokens, " tokens");
    expect_same(reference::parallel(in), expected, "parallel, " + tokens);
    for (const std::int64_t chunk : {1, 2, 7, 16, 64, 1000})
      expect_same(reference::chunked(in, chunk), expected, cat("chunk ", chunk, ", ", tokens));
  }
}

TEST(LightningReference, GradientFormsAgree) {
  for (const Case& c : cases()) {
    const Input in = c.input();
    const auto expected = reference::recurrent_gradient(in, c.grad_o, c.grad_state);
    const std::string tokens = cat(c.shape.tokens, " tokens");
    expect_same(reference::parallel_gradient(in, c.grad_o, c.grad_state), expected,
                "parallel, " + tokens);
    for (const std::int64_t chunk : {1, 2, 7, 16, 64, 1000})
      expect_same(reference::chunked_gradient(in, chunk, c.grad_o, c.grad_state), expected,
                  cat("chunk ", chunk, ", ", tokens));
  }
}

TEST(LightningReference, MissingGradientsAreZero) {
  const Case c = random_case({.tokens = 9});
  const Values zero_o(c.grad_o.size(), 0.0), zero_state(c.grad_state.size(), 0.0);
  const Input in = c.input();
  expect_same(reference::parallel_gradient(in, c.grad_o, {}),
              reference::parallel_gradient(in, c.grad_o, zero_state), "no grad_state");
  expect_same(reference::parallel_gradient(in, {}, c.grad_state),
              reference::parallel_gradient(in, zero_o, c.grad_state), "no grad_o");
}

double loss(const Case& c) {
  const auto out = reference::parallel(c.input());
  double sum = 0;
  for (std::size_t i = 0; i < out->o_BTHV.size(); ++i) sum += out->o_BTHV[i] * c.grad_o[i];
  for (std::size_t i = 0; i < out->state_NHKV.size(); ++i)
    sum += out->state_NHKV[i] * c.grad_state[i];
  return sum;
}

TEST(LightningReference, GradientsMatchFiniteDifferences) {
  for (const Wanted& wanted :
       {Wanted{.batch = 2, .tokens = 6}, Wanted{.offsets = {0, 4, 4, 5, 9}}}) {
    Case c = random_case(wanted);
    const auto gradient = reference::parallel_gradient(c.input(), c.grad_o, c.grad_state);
    const auto check = [&](Values& values, const Values& expected, const char* name) {
      Values measured(values.size());
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double step = 1e-4, kept = values[i];
        values[i] = kept + step;
        const double above = loss(c);
        values[i] = kept - step;
        measured[i] = (above - loss(c)) / (2 * step);
        values[i] = kept;
      }
      EXPECT_LE(error(measured, expected), tolerance::kFiniteDifference) << name;
    };
    check(c.q, gradient->q_BTHK, "dq");
    check(c.k, gradient->k_BTHK, "dk");
    check(c.v, gradient->v_BTHV, "dv");
    check(c.state, gradient->state_NHKV, "dstate");
  }
}

TEST(LightningReference, HalvingDecayByHand) {  // q = k = v = 1, lambda = 1/2, S_init = 8
  Case c = random_case({.tokens = 3, .key_dim = 1, .value_dim = 1, .slope = {std::log(2.0)}});
  c.q = c.k = c.v = {1, 1, 1};
  c.state = {8};
  c.scale = 10;
  for (const auto& out : {reference::parallel(c.input()), reference::chunked(c.input(), 2),
                          reference::recurrent(c.input())}) {
    EXPECT_LE(error(out->o_BTHV, {50, 35, 27.5}), 1e-15);
    EXPECT_LE(error(out->state_NHKV, {2.75}), 1e-15);  // the scale does not enter the state
  }
}

// Trap T1 of public kernels: the history was decayed once too little, and the state by the chunk
// instead of the tail.
TEST(LightningReference, HistoryDecaysByEveryToken) {
  for (const std::int64_t tokens : {1, 15, 16, 17, 33}) {
    Case c = random_case({.tokens = tokens, .slope = {0.84, 0.2, 0.02, 1e-5}});
    std::ranges::fill(c.v, 0.0);
    Values expected = c.state;
    for (std::size_t i = 0; i < expected.size(); ++i)
      expected[i] *= std::exp(-c.slope[i / 6] * static_cast<double>(tokens));
    EXPECT_LE(error(reference::chunked(c.input(), 16)->state_NHKV, expected),
              tolerance::kFormsFloat64);
    EXPECT_LE(error(reference::parallel(c.input())->state_NHKV, expected),
              tolerance::kFormsFloat64);
  }
}

TEST(LightningReference, PrefillThenStepsEqualsOnePass) {
  const Case whole = random_case({.tokens = 37});
  const auto expected = reference::parallel(whole.input());
  Values state = whole.state, o;
  for (std::int64_t from = 0; from < 37; from += from == 0 ? 30 : 1) {
    const std::int64_t tokens = from == 0 ? 30 : 1, heads = 2;
    Input in = whole.input();
    in.shape.tokens = tokens;
    const auto part = [&](std::span<const double> all, std::int64_t dim) {
      return all.subspan(static_cast<std::size_t>(from * heads * dim),
                         static_cast<std::size_t>(tokens * heads * dim));
    };
    in.q_BTHK = part(whole.q, 3);
    in.k_BTHK = part(whole.k, 3);
    in.v_BTHV = part(whole.v, 2);
    in.state_NHKV = state;
    const auto out = reference::chunked(in, 8);
    o.insert(o.end(), out->o_BTHV.begin(), out->o_BTHV.end());
    state = out->state_NHKV;
  }
  EXPECT_LE(error(o, expected->o_BTHV), tolerance::kFormsFloat64);
  EXPECT_LE(error(state, expected->state_NHKV), tolerance::kFormsFloat64);
}

TEST(LightningReference, LimitsOfTheDecay) {
  Case forgets = random_case({.tokens = 20, .slope = {745, 1000}});
  const auto out = reference::parallel(forgets.input());
  for (std::int64_t t = 0; t < 20; ++t)  // o_t = scale (q_t . k_t) v_t
    for (std::int64_t h = 0; h < 2; ++h) {
      double dot = 0;
      for (std::int64_t i = 0; i < 3; ++i)
        dot += forgets.q[static_cast<std::size_t>((t * 2 + h) * 3 + i)] *
               forgets.k[static_cast<std::size_t>((t * 2 + h) * 3 + i)];
      const auto at = static_cast<std::size_t>((t * 2 + h) * 2);
      EXPECT_NEAR(out->o_BTHV[at], 0.7 * dot * forgets.v[at], 1e-12);
    }
  Case keeps =
      random_case({.tokens = 20, .key_dim = 1, .value_dim = 1, .slope = {0}, .state = false});
  double sum = 0;
  for (std::size_t t = 0; t < 20; ++t) sum += keeps.k[t] * keeps.v[t];
  EXPECT_NEAR(reference::chunked(keeps.input(), 6)->state_NHKV[0], sum, 1e-12);
}

TEST(LightningReference, EmptySequenceHandsItsStateOn) {
  const Case c = random_case({.offsets = {0, 3, 3, 5}});
  const auto out = reference::parallel(c.input());
  const auto gradient = reference::parallel_gradient(c.input(), c.grad_o, c.grad_state);
  const std::size_t matrix = 2 * 3 * 2;
  for (std::size_t i = matrix; i < 2 * matrix; ++i) {
    EXPECT_EQ(out->state_NHKV[i], c.state[i]);
    EXPECT_EQ(gradient->state_NHKV[i], c.grad_state[i]);
  }
}

TEST(LightningReference, NanStaysInItsSequence) {
  Case c = random_case({.offsets = {0, 3, 8}});
  c.k[0] = c.v[1] = std::nan("");
  for (const auto& out : {reference::parallel(c.input()), reference::chunked(c.input(), 4),
                          reference::recurrent(c.input())}) {
    EXPECT_TRUE(std::isnan(out->o_BTHV[0]));
    for (std::size_t i = 3 * 2 * 2; i < out->o_BTHV.size(); ++i)
      EXPECT_FALSE(std::isnan(out->o_BTHV[i]));
  }
}

TEST(LightningReference, RefusesWhatDoesNotFit) {
  const auto refused = [](const std::function<void(Case&)>& spoil, const std::string& expected) {
    Case c = random_case({.offsets = {0, 3, 5}});
    spoil(c);
    const auto out = reference::parallel(c.input());
    ASSERT_FALSE(out.ok()) << expected;
    EXPECT_NE(out.status().message().find(expected), std::string::npos) << out.status().message();
  };
  refused([](Case& c) { c.slope[1] = -0.02; }, "slope[1] = -0.02");
  refused([](Case& c) { c.slope[0] = std::nan(""); }, "slope[0]");
  refused([](Case& c) { c.slope[0] = INFINITY; }, "slope[0] = inf");
  refused([](Case& c) { c.slope.pop_back(); }, "1 values for 2 heads");
  refused([](Case& c) { c.scale = INFINITY; }, "scale = inf");
  refused([](Case& c) { c.offsets = {1, 5}; }, "cu_seqlens[0] = 1");
  refused([](Case& c) { c.offsets = {0, 4, 3, 5}; }, "cu_seqlens[2] = 3 is below");
  refused([](Case& c) { c.offsets = {0, 6}; }, "ends at 6 but there are 5");
  refused([](Case& c) { c.offsets = {0}; }, "cu_seqlens has 1 entry");
  refused([](Case& c) { c.shape.batch = 2; }, "batch 2");
  refused([](Case& c) { c.shape.heads = 0; }, "heads = 0");
  refused([](Case& c) { c.shape.key_dim = 0; }, "key dim = 0");
  refused([](Case& c) { c.shape.value_dim = -1; }, "value dim = -1");
  refused([](Case& c) { c.offsets.clear(), c.shape.tokens = -1; }, "tokens = -1");
  refused([](Case& c) { c.state.pop_back(); }, "state has 23 elements");
  refused([](Case& c) { c.q.pop_back(); }, "q has 29 elements");
  EXPECT_FALSE(reference::chunked(random_case({}).input(), 0).ok());
}

// The values are those of the published code (sources in tests/golden/lightning).
TEST(LightningSlopes, EqualThePublishedValues) {
  const auto expect = [](SlopeRule rule, std::int64_t layer, std::int64_t num_layers,
                         const Values& at_0_15_16_19) {
    const auto s = slopes(rule, 20, layer, num_layers);
    ASSERT_TRUE(s.ok());
    ASSERT_EQ(s->size(), 20U);
    const double tolerance =
        rule == SlopeRule::kPaper ? 1e-6 : 1e-12;  // the published paper rule runs in float32
    EXPECT_LE(error({(*s)[0], (*s)[15], (*s)[16], (*s)[19]}, at_0_15_16_19), tolerance);
  };
  expect(SlopeRule::kAlibi, 0, 1,
         {0.7071067811865476, 0.003906250000000004, 0.8408964152537145, 0.2973017787506802});
  expect(SlopeRule::kAlibiLayer, 0, 24,
         {0.7071138522543595, 0.003906289062500005, 0.840904824217867, 0.2973047517684677});
  expect(SlopeRule::kAlibiLayer, 11, 24,
         {0.36893234820861925, 0.0020380825407608715, 0.43873697344435136, 0.1551169445398815});
  expect(SlopeRule::kAlibiLayer, 23, 24,
         {7.071067811865476e-06, 3.906250000000005e-08, 8.408964152537146e-06,
          2.9730177875068023e-06});
  expect(SlopeRule::kMinimaxHf, 0, 24,
         {0.7578658618380317, 0.011841654091219261, 0.008974295640473334, 0.003906289062500007});
  expect(SlopeRule::kMinimaxHf, 23, 24,
         {7.908086290676788e-06, 1.2356384829182496e-07, 9.364388593884832e-08,
          4.076086882665122e-08});
  expect(SlopeRule::kPaper, 11, 24, {0.0, 3.25, 3.4666666984558105, 4.116666793823242});
}

TEST(LightningSlopes, LingCountsLayersFromOneBelow) {
  const auto base = slopes(SlopeRule::kAlibi, 4, 0, 1), ling = slopes(SlopeRule::kLing, 4, 0, 5),
             clamped = slopes(SlopeRule::kLingClamped, 4, 0, 5),
             second = slopes(SlopeRule::kLing, 4, 2, 5),
             layered = slopes(SlopeRule::kAlibiLayer, 4, 1, 5);
  EXPECT_NEAR((*ling)[1], (*base)[1] * 1.25001, 1e-15);
  EXPECT_NEAR((*clamped)[1], (*base)[1] * 1.00001, 1e-15);
  EXPECT_EQ(*second, *layered);
}

TEST(LightningSlopes, AModelOfOneLayerDecays) {
  for (const auto& [rule, name] : kSlopeRules) {
    const auto s = slopes(rule, 8, 0, 1);
    ASSERT_TRUE(s.ok()) << name;
    for (std::size_t h = 1; h < 8; ++h) EXPECT_TRUE((*s)[h] > 0 && (*s)[h] < 10) << name;
  }
}

TEST(LightningSlopes, RefusesWhatIsNoLayer) {
  EXPECT_FALSE(slopes(SlopeRule::kAlibi, 0, 0, 1).ok());
  EXPECT_FALSE(slopes(SlopeRule::kAlibi, 8, 4, 4).ok());
  EXPECT_FALSE(slopes(SlopeRule::kAlibi, 8, -1, 4).ok());
  EXPECT_FALSE(slopes(SlopeRule::kAlibi, 8, 0, 0).ok());
  const auto rule = parse_slope_rule("alibi_layr");
  ASSERT_FALSE(rule.ok());
  EXPECT_NE(rule.status().message().find("Did you mean \"alibi_layer\""), std::string::npos)
      << rule.status().message();
  for (const auto& [expected, name] : kSlopeRules) EXPECT_EQ(*parse_slope_rule(name), expected);
}

}  // namespace
}  // namespace everlong::lightning
