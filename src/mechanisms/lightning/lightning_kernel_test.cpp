// The CPU kernel against the float64 reference, for every instruction set that the machine has.
#include <hwy/highway.h>

#include "mechanisms/lightning/lightning_kernel_test.h"

namespace everlong::lightning {
namespace {

using namespace test;  // NOLINT: the fixtures of this file

void expect_reference(const Wanted& wanted, const Executor& executor = SerialExecutor()) {
  Case c(wanted);
  const Results r = run(c, executor);
  const auto expected = reference::chunked(c.input(), 64);
  const auto gradient = reference::chunked_gradient(c.input(), 64, c.grad_o, c.grad_state);
  ASSERT_TRUE(expected.ok()) << expected.status().message();
  ASSERT_TRUE(gradient.ok()) << gradient.status().message();
  const double allowed = wanted.dtype == DType::kFloat32 ? kFloat32 : kBFloat16Rounding;
  const std::string what = cat("T", c.shape.tokens, " B", wanted.batch, " K", wanted.key_dim, " V",
                               wanted.value_dim, wanted.state ? " +state " : " ",
                               info(wanted.dtype).name, wanted.offsets.empty() ? "" : " packed");
  EXPECT_LE(error(r.o.get(), expected->o_BTHV), allowed) << what << ": o";
  EXPECT_LE(error(r.state.get(), expected->state_NHKV), kFloat32) << what << ": state";
  EXPECT_LE(error(r.grad_q.get(), gradient->q_BTHK), allowed) << what << ": grad q";
  EXPECT_LE(error(r.grad_k.get(), gradient->k_BTHK), allowed) << what << ": grad k";
  EXPECT_LE(error(r.grad_v.get(), gradient->v_BTHV), allowed) << what << ": grad v";
  EXPECT_LE(error(r.grad_state.get(), gradient->state_NHKV), kFloat32) << what << ": grad state";
  for (const Tensor* t : {&r.o, &r.state, &r.grad_q, &r.grad_k, &r.grad_v, &r.grad_state})
    EXPECT_TRUE(t->gaps_untouched()) << what;
}

// Every test of this suite runs for every instruction set.
class LightningKernel : public testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(GetParam());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().DeInit();
  }
};

// Around the chunk; the tail decays by its own length (spec traps T1, T4).
TEST_P(LightningKernel, EqualsTheReferenceAtEveryLength) {
  for (const std::int64_t tokens :
       {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000})
    for (const bool state : {false, true})
      expect_reference({.batch = 2, .tokens = tokens, .state = state});
}

// Tails of vectors and of tiles, key and value dims apart both ways (T2, T5, T12).
TEST_P(LightningKernel, EqualsTheReferenceAtEveryDim) {
  for (const auto& [key_dim, value_dim] : {std::pair{16, 16},
                                           {64, 64},
                                           {96, 96},
                                           {192, 192},
                                           {128, 128},
                                           {24, 40},
                                           {40, 24},
                                           {64, 128},
                                           {256, 128},
                                           {128, 256},
                                           {256, 256},
                                           {8, 200},
                                           {200, 8},
                                           {1, 1},
                                           {3, 17},
                                           {17, 3}})
    expect_reference(
        {.tokens = 70, .key_dim = key_dim, .value_dim = value_dim, .slope = {0.3, 1e-3}});
}

// T10: nothing overflows where exp(s n) would; T6: a head that never decays.
TEST_P(LightningKernel, EqualsTheReferenceAtExtremeSlopes) {
  for (const std::int64_t tokens : {1, 65, 300})
    expect_reference({.tokens = tokens, .slope = {80, 8, 2.7, 0.917, 0.1, 3.9e-3, 1e-5, 4e-8, 0}});
}

TEST_P(LightningKernel, EqualsTheReferenceForAnyStrides) {
  expect_reference({.batch = 3, .tokens = 70, .heads_first = true});
  expect_reference({.batch = 3, .tokens = 70, .dtype = DType::kBFloat16, .heads_first = true});
}

TEST_P(LightningKernel, PackedSequencesOfAnyLengths) {
  const std::vector<Offsets> lines = {{0, 300, 300, 301, 365, 366, 430, 494},
                                      {0, 3, 5, 6, 7, 7, 12, 20, 21},
                                      {0, 1, 2, 3},
                                      {0, 0, 130},
                                      {0, 0, 0}};
  for (const auto& offsets : lines)
    for (const bool state : {false, true}) expect_reference({.offsets = offsets, .state = state});
}

// T11: fp32 inside, one rounding at the end; the state never sees bf16.
TEST_P(LightningKernel, BFloat16IsRoundedOnce) {
  for (const std::int64_t tokens : {1, 65, 300})
    expect_reference({.tokens = tokens,
                      .key_dim = 32,
                      .value_dim = 40,
                      .slope = {0.1, 4e-8, 8},
                      .dtype = DType::kBFloat16});
}

// T1: tokens one at a time go on where a prefill stopped, in place and not.
TEST_P(LightningKernel, PrefillThenStepsEqualsOnePass) {
  for (const auto dtype : {DType::kFloat32, DType::kBFloat16})
    for (const auto& [key_dim, value_dim] :
         {std::pair{64, 64}, {128, 128}, {24, 40}, {7, 131}, {1, 1}}) {
      constexpr std::int64_t kPrefill = 45, kTokens = 49;
      Case c({.batch = 2,
              .tokens = kTokens,
              .key_dim = key_dim,
              .value_dim = value_dim,
              .slope = {0.84, 1e-5, 0},
              .dtype = dtype});
      Tensor o = c.values(), state = c.states(), other = c.states();
      auto workspace = poisoned_workspace(c, 1);
      auto whole = c.args(o, &state);
      const auto cut = [&](std::int64_t first, std::int64_t count) {
        auto piece = whole;
        const auto narrow = [&](auto& view) {
          view.sizes[1] = count;
          auto* bytes = const_cast<std::byte*>(static_cast<const std::byte*>(view.data));
          view.data =
              bytes + first * view.strides[1] * static_cast<std::int64_t>(info(dtype).bytes);
        };
        narrow(piece.q_BTHK), narrow(piece.k_BTHK), narrow(piece.v_BTHV), narrow(piece.o_BTHV);
        return piece;
      };
      ASSERT_TRUE(cpu::forward(cut(0, kPrefill), workspace, SerialExecutor()).ok());
      for (std::int64_t t = kPrefill; t < kTokens; ++t) {
        auto one = cut(t, 1);
        const bool in_place = t % 2 == 0;
        one.state_NHKV = state.view();
        one.state_out_NHKV = in_place ? state.view() : other.view();
        ASSERT_TRUE(cpu::step(one, Threads(2)).ok());
        if (!in_place) std::swap(state, other);
      }
      const auto expected = reference::recurrent(c.input());
      ASSERT_TRUE(expected.ok());
      const double allowed = dtype == DType::kFloat32 ? kFloat32 : kBFloat16Rounding;
      EXPECT_LE(error(o.get(), expected->o_BTHV), allowed) << key_dim << " " << value_dim;
      EXPECT_LE(error(state.get(), expected->state_NHKV), kFloat32) << key_dim << " " << value_dim;
      EXPECT_TRUE(o.gaps_untouched() && state.gaps_untouched());
    }
}

// Without states, and only some of the gradients wanted: the same bits as all of them.
TEST_P(LightningKernel, AbsentTensorsAreNotNeeded) {
  Case c({.tokens = 70, .state = false});
  c.tgrad_state.set(c.grad_state = Values(c.grad_state.size(), 0.0));
  const Results all = run(c, SerialExecutor());
  auto workspace = poisoned_workspace(c, 1);
  Tensor o = c.values();
  ASSERT_TRUE(cpu::forward(c.args(o, nullptr), workspace, SerialExecutor()).ok());
  EXPECT_EQ(o.bytes(), all.o.bytes());
  for (int wanted = 0; wanted < 4; ++wanted) {
    Tensor keys = c.keys(), values = c.values(), states = c.states();
    cpu::BackwardArgs args{.q_BTHK = c.tq.view(),
                           .k_BTHK = c.tk.view(),
                           .v_BTHV = c.tv.view(),
                           .grad_o_BTHV = c.tgrad_o.view(),
                           .slope = c.w.slope,
                           .scale = c.w.scale};
    if (wanted == 0) args.grad_q_BTHK = keys.view();
    if (wanted == 1) args.grad_k_BTHK = keys.view();
    if (wanted == 2) args.grad_v_BTHV = values.view();
    if (wanted == 3) args.grad_state_in_NHKV = states.view();
    ASSERT_TRUE(cpu::backward(args, workspace, SerialExecutor()).ok());
    const Tensor& expected = wanted == 0   ? all.grad_q
                             : wanted == 1 ? all.grad_k
                             : wanted == 2 ? all.grad_v
                                           : all.grad_state;
    EXPECT_EQ((wanted < 2 ? keys : wanted == 2 ? values : states).get(), expected.get()) << wanted;
  }
}

// NaN and what lies between a sequence's tokens stay where they are, also in the workspace.
TEST_P(LightningKernel, NanStaysInItsSequence) {
  Case c({.offsets = {0, 3, 80, 90, 170}});
  const Results healthy = run(c, SerialExecutor());
  const std::size_t row = c.w.slope.size() * 16;
  for (std::size_t i = 3 * row; i < 80 * row; ++i)
    c.k[i] = std::numeric_limits<double>::quiet_NaN();
  c.tk.set(c.k);
  const Results sick = run(c, SerialExecutor());
  const auto same_outside = [&](const Values& a, const Values& b, std::size_t width) {
    for (std::size_t i = 0; i < a.size(); ++i)
      if (i < 3 * width || i >= 80 * width) {
        EXPECT_EQ(a[i], b[i]);
      }
  };
  same_outside(sick.o.get(), healthy.o.get(), c.w.slope.size() * 24);
  same_outside(sick.grad_q.get(), healthy.grad_q.get(), row);
  same_outside(sick.grad_k.get(), healthy.grad_k.get(), row);
  same_outside(sick.grad_v.get(), healthy.grad_v.get(), c.w.slope.size() * 24);
}

// A key reaches no token before it, not even times zero.
TEST_P(LightningKernel, NanInAKeyStaysInItsFuture) {
  Case c({.tokens = 64, .key_dim = 16, .value_dim = 24});
  const Results healthy = run(c, SerialExecutor());
  constexpr std::size_t kSick = 45;
  const std::size_t keys = c.w.slope.size() * 16, values = c.w.slope.size() * 24;
  for (std::size_t i = 0; i < keys; ++i)
    c.k[kSick * keys + i] = std::numeric_limits<double>::quiet_NaN();
  c.tk.set(c.k);
  const Values sick = run(c, SerialExecutor()).o.get(), expected = healthy.o.get();
  for (std::size_t i = 0; i < sick.size(); ++i) {
    if (i < kSick * values) {
      EXPECT_EQ(sick[i], expected[i]) << i / values;
    } else {
      EXPECT_TRUE(std::isnan(sick[i])) << i / values;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, LightningKernel, testing::ValuesIn([] {
                           hwy::SetSupportedTargetsForTest(0);
                           std::vector<std::int64_t> targets;
                           for (std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS;
                                rest != 0; rest &= rest - 1)
                             targets.push_back(rest & -rest);
                           return targets;
                         }()),
                         [](const auto& test) { return std::string(hwy::TargetName(test.param)); });

}  // namespace
}  // namespace everlong::lightning
