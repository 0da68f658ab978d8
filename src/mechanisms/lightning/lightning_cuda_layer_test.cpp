// Layers whose states are written behind, against the same layers without and against whole
// prompts. Skipped where there is no GPU from sm_80 on.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "mechanisms/lightning/layer.h"
#include "mechanisms/lightning/op_cuda.h"
#include "ops/runtime.h"
#include "support/compare.h"

namespace everlong::lightning {
namespace {

// Before any other call of torch, which would remember that there is no CUDA.
const bool gpu = load_cuda_backend().ok() && at::hasCUDA();
const at::Device kDevice(at::kCUDA, 0);

constexpr std::int64_t kHidden = 64, kRows = 2, kPrompt = 37;

struct Form {
  const char *form, *lrpe;
};
struct Variant {
  Form form;
  at::ScalarType dtype;
};
std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const Form form : {Form{"transnormer", "none"}, {"transnormer", "all"}, {"minimax", "none"}})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) all.push_back({form, dtype});
  return all;
}

// The same weights whatever `write_behind` is.
std::shared_ptr<Mixer> make(const Variant& variant, const char* write_behind,
                            std::int64_t heads = 2, std::int64_t head_dim = 32) {
  LayerSpec spec;
  spec.hidden_size = kHidden;
  spec.num_layers = 4;
  spec.settings = {{"form", variant.form.form},
                   {"lrpe", variant.form.lrpe},
                   {"num_heads", heads},
                   {"head_dim", head_dim},
                   {"write_behind", write_behind}};
  at::manual_seed(7);
  auto made = make_layer(spec);
  TORCH_CHECK(made.ok(), made.status().message());
  (*made)->to(kDevice, variant.dtype);
  return *std::move(made);
}
at::Tensor random_rows(const Variant& variant, std::int64_t tokens, std::int64_t rows = kRows) {
  at::manual_seed(8);
  return at::randn({rows, tokens, kHidden}).to(kDevice, variant.dtype);
}

at::Tensor S_of(const State& state) { return state.tensors().at("S"); }
std::int64_t waiting(const State& state) {
  return dynamic_cast<const LightningState&>(state).waiting();
}

// A layer, and a state of it that has read the prompt.
struct Course {
  std::shared_ptr<Mixer> mixer;
  std::unique_ptr<State> state;

  Course(const Variant& variant, const char* write_behind, const at::Tensor& x)
      : mixer(make(variant, write_behind)), state(mixer->make_state(x.size(0))) {
    at_once(x, 0, kPrompt);
  }
  at::Tensor at_once(const at::Tensor& x, std::int64_t from, std::int64_t count) {
    return mixer->forward(x.narrow(1, from, count), {}, state.get());
  }
  at::Tensor singly(const at::Tensor& x, std::int64_t from, std::int64_t count) {
    std::vector<at::Tensor> y;
    for (std::int64_t t = from; t < from + count; ++t) y.push_back(at_once(x, t, 1));
    return at::cat(y, 1);
  }
};

double norm_error(const at::Tensor& actual, const at::Tensor& expected) {
  TORCH_CHECK(actual.sizes() == expected.sizes());
  const auto a = actual.detach().to(at::kDouble), b = expected.detach().to(at::kDouble);
  const double error = ((a - b).norm() / b.norm()).item<double>();
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}
// As in lightning_cuda_ring_test.cpp: one rounding of o, and sums in fp32 of the state.
double rounding(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 2.5e-3 : 1e-5; }
constexpr double kState = 1e-5;

class LightningCudaLayer : public testing::Test {
 protected:
  void SetUp() override {
    if (!gpu || !takes_cuda_sweep(kDevice, at::kFloat, 1, 8, 8))
      GTEST_SKIP() << "no GPU from sm_80 on here";
  }
  const at::NoGradGuard no_grad_;
};

TEST_F(LightningCudaLayer, SingleTokensGiveWhatTheyGiveWithoutRingsAndAtOnce) {
  for (const Variant& variant : variants())
    for (const std::int64_t tokens : {1, 15, 16, 17, 40}) {
      SCOPED_TRACE(testing::Message() << variant.form.form << " " << variant.form.lrpe << " "
                                      << variant.dtype << " " << tokens);
      const at::Tensor x = random_rows(variant, kPrompt + tokens);
      Course on(variant, "on", x), off(variant, "off", x);
      const at::Tensor y = on.singly(x, kPrompt, tokens);
      EXPECT_EQ(waiting(*on.state), tokens % 16);
      EXPECT_LT(norm_error(y, off.singly(x, kPrompt, tokens)), rounding(variant.dtype));
      EXPECT_EQ(waiting(*off.state), 0);
      EXPECT_LT(norm_error(S_of(*on.state), S_of(*off.state)), kState);
      EXPECT_EQ(waiting(*on.state), 0) << "whoever looks sees all of it";
      EXPECT_EQ(on.state->positions(), std::vector<std::int64_t>(kRows, kPrompt + tokens));

      const auto whole = on.mixer->make_state(kRows);
      const at::Tensor at_once = on.mixer->forward(x, {}, whole.get());
      EXPECT_LT(norm_error(y, at_once.narrow(1, kPrompt, tokens)),
                tolerance::split_of(variant.dtype));
      EXPECT_LT(norm_error(S_of(*on.state), S_of(*whole)), tolerance::split_of(variant.dtype));
    }
}

// A fold in place would reach the snapshot if the state did not make S its own first.
TEST_F(LightningCudaLayer, ASnapshotInTheMiddleOfARingStaysAndRestoresExactly) {
  for (const Variant& variant : variants()) {
    const at::Tensor x = random_rows(variant, kPrompt + 25);
    Course on(variant, "on", x), off(variant, "off", x);
    on.singly(x, kPrompt, 5);
    off.singly(x, kPrompt, 5);
    ASSERT_EQ(waiting(*on.state), 5);
    const TensorMap snapshot = {{"S", S_of(*on.state).detach()}};  // the same memory, all the same
    const at::Tensor copy = snapshot.at("S").clone();
    EXPECT_LT(norm_error(copy, S_of(*off.state)), kState);
    const at::Tensor y = on.singly(x, kPrompt + 5, 20), S = S_of(*on.state).clone();
    EXPECT_TRUE(at::equal(snapshot.at("S"), copy));
    EXPECT_LT(norm_error(y, off.singly(x, kPrompt + 5, 20)), rounding(variant.dtype));

    on.singly(x, kPrompt, 3);  // what waits then is of another course
    ASSERT_EQ(waiting(*on.state), 3);
    for (int course = 0; course < 2; ++course) {
      ASSERT_TRUE(on.state->restore(snapshot).ok());
      on.state->positions().assign(kRows, kPrompt + 5);
      EXPECT_TRUE(at::equal(on.singly(x, kPrompt + 5, 20), y));
      EXPECT_TRUE(at::equal(S_of(*on.state), S));
      EXPECT_TRUE(at::equal(snapshot.at("S"), copy));
    }
  }
}

TEST_F(LightningCudaLayer, AForkInTheMiddleOfARingGoesItsOwnWay) {
  const std::vector<std::int64_t> picks = {1, -1, 0, 1};
  for (const Variant& variant : variants()) {
    const at::Tensor x = random_rows(variant, kPrompt + 25),
                     others = random_rows(variant, 25, /*rows=*/4);
    Course on(variant, "on", x), off(variant, "off", x);
    const auto forked = [&](Course& run) {
      run.singly(x, kPrompt, 5);
      auto fork = run.state->select(picks);
      std::vector<at::Tensor> y;
      for (std::int64_t t = 0; t < 20; ++t) {  // both courses, token by token
        y.push_back(run.mixer->forward(others.narrow(1, t, 1), {}, fork.get()));
        y.push_back(run.at_once(x, kPrompt + 5 + t, 1));
      }
      EXPECT_EQ(fork->positions(),
                (std::vector<std::int64_t>{kPrompt + 25, 20, kPrompt + 25, kPrompt + 25}));
      y.push_back(S_of(*fork));
      y.push_back(S_of(*run.state));
      return y;
    };
    const auto y = forked(on), expected = forked(off);
    for (std::size_t i = 0; i < y.size(); ++i)
      EXPECT_LT(norm_error(y[i], expected[i]), y[i].dim() == 4 ? kState : rounding(variant.dtype))
          << i;
  }
}

TEST_F(LightningCudaLayer, SeveralTokensFindTheStateWhole) {
  for (const Variant& variant : variants()) {
    const at::Tensor x = random_rows(variant, kPrompt + 40);
    const at::Tensor line = x.narrow(1, kPrompt + 17, 2).reshape({1, 4, kHidden});
    Course on(variant, "on", x), off(variant, "off", x);
    const auto course = [&](Course& run) {
      std::vector<at::Tensor> y = {run.singly(x, kPrompt, 5), run.at_once(x, kPrompt + 5, 9),
                                   run.singly(x, kPrompt + 14, 3)};
      y.push_back(run.mixer->forward(line, {{0, 1, 4}}, run.state.get()));
      y.push_back(run.singly(x, kPrompt + 19, 18));
      y.push_back(run.at_once(x, kPrompt + 37, 0));
      EXPECT_EQ(y.back().size(1), 0);
      y.back() = S_of(*run.state);
      EXPECT_EQ(run.state->positions(), (std::vector<std::int64_t>{kPrompt + 36, kPrompt + 38}));
      return y;
    };
    const auto y = course(on), expected = course(off);
    for (std::size_t i = 0; i < y.size(); ++i)
      EXPECT_LT(norm_error(y[i], expected[i]), y[i].dim() == 4 ? kState : rounding(variant.dtype))
          << i;
  }
}

// The backward passes come after later tokens: what autograd kept must still be there.
TEST_F(LightningCudaLayer, GradientsInTheMiddleOfARingAreThoseOfTheWholeState) {
  for (const Variant& variant : variants()) {
    const at::Tensor x = random_rows(variant, kPrompt + 40);
    Course on(variant, "on", x), off(variant, "off", x);
    const auto course = [&](Course& run) {
      run.singly(x, kPrompt, 5);
      const at::Tensor weight = at::ones_like(S_of(*run.state)).set_requires_grad(true);
      const at::Tensor source = x.narrow(1, kPrompt + 5, 1).clone().set_requires_grad(true);
      at::Tensor before, after;
      {
        const at::AutoGradMode on_again(true);
        before = (weight * S_of(*run.state)).sum();
      }
      const at::Tensor S = S_of(*run.state).clone();
      run.singly(x, kPrompt, 20);  // S is folded twice while autograd holds the old one
      {
        const at::AutoGradMode on_again(true);
        const at::Tensor y = run.mixer->forward(source, {}, run.state.get());
        after = y.square().sum() + S_of(*run.state).sum();
      }
      EXPECT_EQ(waiting(*run.state), 0);
      EXPECT_TRUE(S_of(*run.state).requires_grad());
      run.singly(x, kPrompt + 6, 20);
      EXPECT_FALSE(S_of(*run.state).requires_grad());
      before.backward();
      after.backward();
      EXPECT_TRUE(at::equal(weight.grad(), S));
      return std::vector{weight.grad(), source.grad(), S_of(*run.state)};
    };
    const auto found = course(on), expected = course(off);
    EXPECT_LT(norm_error(found[0], expected[0]), kState);
    EXPECT_LT(norm_error(found[1], expected[1]), rounding(variant.dtype));
    EXPECT_LT(norm_error(found[2], expected[2]), kState);
  }
}

TEST_F(LightningCudaLayer, StatesAreWrittenBehindWhereThatPaysAndTheBoundHolds) {
  const Variant variant{{"transnormer", "none"}, at::kBFloat16};
  const auto expect = [&](const char* write_behind, std::int64_t rows, std::int64_t waits) {
    const auto mixer = make(variant, write_behind, /*heads=*/8, /*head_dim=*/128);
    const auto state = mixer->make_state(rows);
    EXPECT_LE(state->bytes(), state->bytes_bound(0));
    mixer->forward(random_rows(variant, 1, rows), {}, state.get());
    mixer->forward(random_rows(variant, 1, rows), {}, state.get());
    EXPECT_EQ(waiting(*state), waits) << write_behind << " " << rows;
    EXPECT_EQ(state->bytes(), state->bytes_bound(2)) << write_behind << " " << rows;
    EXPECT_EQ(waiting(*state), waits) << "asking for the size moves nothing";
  };
  expect("auto", 64, 2);  // 32 MiB
  expect("auto", 63, 0);
  expect("on", 1, 2);
  expect("off", 64, 0);
}

}  // namespace
}  // namespace everlong::lightning
