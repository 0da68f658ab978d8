#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/rope.h"
#include "mechanisms/mechanism.h"
#include "mechanisms/softmax/layer_cache.h"
#include "mechanisms/softmax/op.h"

namespace everlong::softmax {
const Mechanism& mechanism();
namespace {

constexpr std::int64_t kWidth = 16;
constexpr double kFp64 = 1e-12;

std::shared_ptr<Mixer> layer(nlohmann::json settings, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(11);
  settings.update({{"num_heads", 4}, {"num_kv_heads", 2}, {"head_dim", 6}});
  auto made =
      mechanism().make_layer({.hidden_size = kWidth, .num_layers = 2, .settings = settings});
  EXPECT_TRUE(made.ok()) << made.status().message();
  (*made)->to(dtype);
  return *made;
}

double largest(const at::Tensor& difference) {
  return difference.numel() == 0 ? 0 : difference.abs().max().item<double>();
}

at::Tensor inputs(std::int64_t batch, std::int64_t tokens, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(static_cast<std::uint64_t>(100 * batch + tokens));
  return at::randn({batch, tokens, kWidth}, at::kDouble).to(dtype);
}

const std::vector<nlohmann::json>& kinds() {
  static const std::vector<nlohmann::json> all = {{{"window", 0}},
                                                  {{"window", 1}},
                                                  {{"window", 5}, {"rope", "interleaved"}},
                                                  {{"window", 40}, {"rope", "none"}}};
  return all;
}

// One rotation matrix a position, multiplied the plain way.
at::Tensor turn(const at::Tensor& x_THD, RopePairs pairs, std::int64_t rotary) {
  at::Tensor out = x_THD.clone();
  for (std::int64_t t = 0; t < x_THD.size(0); ++t)
    for (std::int64_t i = 0; i < rotary / 2; ++i) {
      const double angle =
          static_cast<double>(t) *
          std::pow(100.0, -2.0 * static_cast<double>(i) / static_cast<double>(rotary));
      const bool split = pairs == RopePairs::kHalfSplit;
      const std::int64_t a = split ? i : 2 * i, b = split ? i + rotary / 2 : 2 * i + 1;
      const auto xa = x_THD.select(0, t).select(1, a), xb = x_THD.select(0, t).select(1, b);
      out.select(0, t).select(1, a).copy_(xa * std::cos(angle) - xb * std::sin(angle));
      out.select(0, t).select(1, b).copy_(xb * std::cos(angle) + xa * std::sin(angle));
    }
  return out;
}

TEST(SoftmaxLayer, EqualsTheFormulaWithEitherRotation) {
  at::NoGradGuard guard;
  for (const auto& [name, pairs] :
       {std::pair("half_split", RopePairs::kHalfSplit), {"interleaved", RopePairs::kInterleaved}})
    for (const std::int64_t rotary : {4, 6}) {
      const auto mixer =
          layer({{"rope", name}, {"rope_theta", 100}, {"rotary_dim", rotary}, {"scale", 0.3}});
      const at::Tensor x = inputs(1, 20);
      const auto weights = mixer->named_parameters();
      const auto project = [&](const char* which, std::int64_t heads) {
        return at::matmul(x[0], weights[which].t()).view({20, heads, 6});
      };
      const at::Tensor q = turn(project("q_proj.weight", 4), pairs, rotary),
                       k = turn(project("k_proj.weight", 2), pairs, rotary);
      const at::Tensor o = naive(q.unsqueeze(0), k.unsqueeze(0),
                                 project("v_proj.weight", 2).unsqueeze(0), {.scale = 0.3});
      const at::Tensor want = at::matmul(o.reshape({1, 20, 24}), weights["o_proj.weight"].t());
      EXPECT_LE(largest(mixer->forward(x, {}, nullptr) - want), kFp64) << name << " " << rotary;
    }
}

TEST(SoftmaxLayer, SaysWhichPathItTakes) {
  EXPECT_EQ(layer(kinds()[0], at::kFloat)->path(at::kCPU), "cpu kernel");
  EXPECT_EQ(layer(kinds()[0], at::kBFloat16)->path(at::kCPU), "cpu kernel");
  EXPECT_EQ(layer(kinds()[0])->path(at::kCPU), "composite (ATen)");
}

// Prefill, single tokens and a piece over the cache, by the kernel; one pass in fp64 without it.
TEST(SoftmaxLayer, TheKernelStepsAsTheCompositeFormDoes) {
  at::NoGradGuard guard;
  for (const auto& settings : kinds()) {
    const auto exact = layer(settings), fast = layer(settings, at::kFloat);
    const at::Tensor x = inputs(2, 300);
    const at::Tensor want = exact->forward(x, {}, nullptr);
    const auto state = fast->make_state(2);
    std::vector<at::Tensor> parts;
    std::int64_t done = 0;
    for (const std::int64_t piece : {200, 1, 1, 1, 7, 89, 1}) {
      parts.push_back(fast->forward(x.narrow(1, done, piece).to(at::kFloat), {}, state.get()));
      done += piece;
    }
    // fp32 in weights, projections and scores; outputs of size 1.
    EXPECT_LE(largest(at::cat(parts, 1) - want), 1e-5) << settings.dump();
  }
}

TEST(SoftmaxLayer, AnyCutGivesTheSameOutputsAndTheSameState) {
  at::NoGradGuard guard;
  std::mt19937 random(5);
  for (const auto& settings : kinds())
    for (const std::int64_t batch : {1, 3}) {
      const auto mixer = layer(settings);
      const std::int64_t tokens = 300;  // beyond one capacity step
      const at::Tensor x = inputs(batch, tokens);
      const at::Tensor want = mixer->forward(x, {}, nullptr);
      const auto at_once = mixer->make_state(batch);
      EXPECT_LE(largest(mixer->forward(x, {}, at_once.get()) - want), kFp64);
      for (int round = 0; round < 6; ++round) {
        const auto state = mixer->make_state(batch);
        std::vector<at::Tensor> parts;
        for (std::int64_t done = 0; done < tokens;) {
          const std::int64_t most = round == 0 ? 1 : tokens - done;
          const std::int64_t piece =
              std::uniform_int_distribution<std::int64_t>(round == 0 ? 1 : 0, most)(random);
          parts.push_back(mixer->forward(x.narrow(1, done, piece), {}, state.get()));
          done += piece;
        }
        EXPECT_LE(largest(at::cat(parts, 1) - want), kFp64) << settings.dump();
        EXPECT_EQ(state->positions(), at_once->positions());
        for (const auto& [name, tensor] : at_once->tensors()) {
          ASSERT_EQ(state->tensors().at(name).sizes(), tensor.sizes()) << name << settings.dump();
          EXPECT_LE(largest(state->tensors().at(name) - tensor), kFp64) << name << settings.dump();
        }
      }
    }
}

TEST(SoftmaxLayer, GradientsFlowThroughWhatIsCarried) {
  for (const auto& settings : kinds()) {
    const auto mixer = layer(settings);
    const at::Tensor x = inputs(2, 30).requires_grad_(true), g = inputs(2, 30) + 1;
    auto sources = mixer->parameters();
    sources.push_back(x);
    const auto want = torch::autograd::grad({mixer->forward(x, {}, nullptr)}, sources, {g});
    const auto state = mixer->make_state(2);
    std::vector<at::Tensor> parts;
    for (const auto& [begin, end] : {std::pair(0, 7), {7, 8}, {8, 8}, {8, 21}, {21, 30}})
      parts.push_back(mixer->forward(x.narrow(1, begin, end - begin), {}, state.get()));
    const auto got = torch::autograd::grad({at::cat(parts, 1)}, sources, {g});
    for (std::size_t i = 0; i < sources.size(); ++i)
      EXPECT_LE(largest(got[i] - want[i]), 1e-10 * (1 + largest(want[i]))) << i << settings.dump();
  }
}

TEST(SoftmaxLayer, RestoredLeavesReceiveTheGradientOfTheCarriedState) {
  // Back-propagation in two halves: the second half's gradient of the state is the first half's
  // incoming gradient.
  const auto mixer = layer({{"window", 5}});
  const at::Tensor x = inputs(1, 20).requires_grad_(true), g = inputs(1, 20);
  const auto want = torch::autograd::grad({mixer->forward(x, {}, nullptr)}, {x}, {g})[0];
  const auto state = mixer->make_state(1);
  const at::Tensor head = mixer->forward(x.narrow(1, 0, 12), {}, state.get());
  const TensorMap carried = state->tensors();
  TensorMap leaves;
  for (const auto& [name, tensor] : carried)
    leaves[name] = tensor.detach().clone().requires_grad_(true);
  ASSERT_TRUE(state->restore(leaves).ok());
  const at::Tensor tail = mixer->forward(x.narrow(1, 12, 8), {}, state.get());
  const auto late =
      torch::autograd::grad({tail}, {x, leaves["k"], leaves["v"]}, {g.narrow(1, 12, 8)});
  const auto early = torch::autograd::grad({head, carried.at("k"), carried.at("v")}, {x},
                                           {g.narrow(1, 0, 12), late[1], late[2]})[0];
  EXPECT_LE(largest(early + late[0] - want), kFp64);
}

TEST(SoftmaxLayer, RaggedSequencesMatchEachOneAlone) {
  at::NoGradGuard guard;
  for (const auto& settings : kinds()) {
    const auto mixer = layer(settings);
    const std::vector<std::int64_t> lengths = {70, 0, 1, 300};
    Sequences ragged;
    ragged.offsets = {0};
    for (const auto length : lengths) ragged.offsets.push_back(ragged.offsets.back() + length);
    const at::Tensor x = inputs(1, ragged.offsets.back()), next = inputs(4, 3);
    const auto state = mixer->make_state(4);
    const at::Tensor packed = mixer->forward(x, ragged, state.get());
    EXPECT_LE(largest(packed - mixer->forward(x, ragged, nullptr)), kFp64);
    const at::Tensor stepped =
        mixer->forward(next, {}, state.get());  // rows at four different positions
    for (std::int64_t n = 0; n < 4; ++n) {
      const std::int64_t begin = ragged.offsets[static_cast<std::size_t>(n)],
                         length = lengths[static_cast<std::size_t>(n)];
      const auto alone = mixer->make_state(1);
      const at::Tensor first = mixer->forward(x.narrow(1, begin, length), {}, alone.get());
      EXPECT_LE(largest(packed.narrow(1, begin, length) - first), kFp64) << n << settings.dump();
      EXPECT_LE(
          largest(stepped.narrow(0, n, 1) - mixer->forward(next.narrow(0, n, 1), {}, alone.get())),
          kFp64)
          << n << settings.dump();
      EXPECT_EQ(state->positions()[static_cast<std::size_t>(n)], length + 3);
    }
  }
}

TEST(SoftmaxLayer, SavedAndLoadedContinuesBitForBit) {
  at::NoGradGuard guard;
  for (const auto& settings : kinds())
    for (const std::int64_t before : {0, 1, 39, 256, 300}) {
      const auto mixer = layer(settings, at::kFloat);
      const at::Tensor x = inputs(2, before, at::kFloat), next = inputs(2, 9, at::kFloat);
      const auto state = mixer->make_state(2), loaded = mixer->make_state(2);
      mixer->forward(x, {}, state.get());
      TensorMap copies;
      for (const auto& [name, tensor] : state->tensors()) copies[name] = tensor.clone();
      ASSERT_TRUE(loaded->restore(copies).ok());
      loaded->positions() = state->positions();
      for (std::int64_t t = 0; t < 9; ++t)
        EXPECT_TRUE(at::equal(mixer->forward(next.narrow(1, t, 1), {}, state.get()),
                              mixer->forward(next.narrow(1, t, 1), {}, loaded.get())));
    }
}

TEST(SoftmaxLayer, ForksAndHandlesDoNotDisturbEachOther) {
  at::NoGradGuard guard;
  const auto mixer = layer({{"window", 0}}, at::kFloat);
  const at::Tensor x = inputs(1, 20, at::kFloat), left = inputs(1, 5, at::kFloat),
                   right = left * -2;
  const auto fed = [&] {
    auto state = mixer->make_state(1);
    mixer->forward(x, {}, state.get());
    return state;
  };
  const auto step = [&](const at::Tensor& tokens, std::int64_t t, State& state) {
    return mixer->forward(tokens.narrow(1, t, 1), {}, &state);
  };
  const auto alone_left = fed(), alone_right = fed();
  const auto a = fed(), forked = a->clone(), borrowed = mixer->make_state(1);
  const TensorMap handles = a->tensors();
  ASSERT_TRUE(borrowed->restore(handles).ok());  // the same memory as a's
  borrowed->positions() = a->positions();
  for (std::int64_t t = 0; t < 5; ++t) {
    const at::Tensor want_left = step(left, t, *alone_left), want = step(right, t, *alone_right);
    EXPECT_TRUE(at::equal(step(left, t, *a), want_left)) << t;
    EXPECT_TRUE(at::equal(step(right, t, *forked), want)) << t;
    EXPECT_TRUE(at::equal(step(right, t, *borrowed), want)) << t;
  }
  ASSERT_TRUE(a->restore(handles).ok());  // back to where the handles were taken
  a->positions() = {20};
  const auto again = fed();
  EXPECT_TRUE(at::equal(step(right, 0, *a), step(right, 0, *again)));
}

TEST(SoftmaxLayer, SelectReordersAndRefreshes) {
  at::NoGradGuard guard;
  for (const auto& settings : kinds()) {
    const auto mixer = layer(settings);
    const auto state = mixer->make_state(2);
    mixer->forward(inputs(1, 330), {{0, 30, 330}}, state.get());
    const std::vector<std::int64_t> picks = {1, -1, 0, 1};
    const auto picked = state->select(picks);
    EXPECT_EQ(picked->positions(), (std::vector<std::int64_t>{300, 0, 30, 300}));
    const at::Tensor next = inputs(1, 4).expand({4, 4, kWidth});
    const at::Tensor got = mixer->forward(next, {}, picked.get());
    const at::Tensor old = mixer->forward(next.narrow(0, 0, 2), {}, state.get());
    const at::Tensor fresh = mixer->forward(next.narrow(0, 0, 1), {}, nullptr);
    EXPECT_LE(largest(got - at::stack({old[1], fresh[0], old[0], old[1]})), kFp64)
        << settings.dump();
    const auto small = state->select(std::vector<std::int64_t>{0});
    EXPECT_LE(small->bytes(), small->bytes_bound(small->positions()[0])) << settings.dump();
  }
}

TEST(SoftmaxLayer, BytesStayWithinTheDeclaredBound) {
  for (const bool graph : {false, true})
    for (const auto& settings : kinds()) {
      at::AutoGradMode mode(graph);
      const auto mixer = layer(settings, at::kFloat);
      const auto state = mixer->make_state(2);
      std::int64_t position = 0;
      EXPECT_LE(state->bytes(), state->bytes_bound(0));
      for (const std::int64_t piece : {1, 1, 3, 35, 40, 1, 200, 1, 600, 2}) {
        mixer->forward(inputs(2, piece, at::kFloat), {}, state.get());
        position += piece;
        EXPECT_LE(state->bytes(), state->bytes_bound(position)) << position << settings.dump();
      }
      // The bound is not idle: within a window it is flat, without one it is near what is needed.
      const std::int64_t far = state->bytes_bound(std::int64_t{1} << 40);
      if (settings["window"] != 0) {
        EXPECT_EQ(far, state->bytes_bound(1000));
      } else {
        EXPECT_LT(static_cast<double>(far), 1.13 * 0x1p40 * 2 * 2 * 12 * 4);
      }
      EXPECT_GT(state->bytes_bound(std::numeric_limits<std::int64_t>::max()), 0);
    }
}

TEST(SoftmaxLayer, ABrokenSequenceLeavesItsNeighboursAlone) {
  at::NoGradGuard guard;
  for (const auto& settings : kinds()) {
    const auto mixer = layer(settings);
    at::Tensor x = inputs(3, 50);
    const auto healthy = mixer->make_state(3), state = mixer->make_state(3);
    const at::Tensor want = mixer->forward(x, {}, healthy.get()),
                     want_next = mixer->forward(x, {}, healthy.get());
    x[1].fill_(std::numeric_limits<double>::quiet_NaN());
    for (const at::Tensor& expected : {want, want_next}) {
      const at::Tensor got = mixer->forward(x, {}, state.get());
      EXPECT_TRUE(at::equal(got[0], expected[0]) && at::equal(got[2], expected[2]))
          << settings.dump();
      EXPECT_TRUE(got[1].isnan().all().item<bool>());
    }
    const auto fresh = state->select(std::vector<std::int64_t>{-1, 0});
    const at::Tensor next = mixer->forward(inputs(2, 3), {}, fresh.get());
    EXPECT_TRUE(next.isfinite().all().item<bool>());
  }
}

TEST(SoftmaxLayer, RefusesWhatDoesNotFit) {
  const auto refused = [](nlohmann::json settings) {
    return !mechanism().make_layer({.hidden_size = kWidth, .settings = std::move(settings)}).ok();
  };
  EXPECT_TRUE(refused({{"num_heads", 4}, {"num_kv_heads", 3}}));
  EXPECT_TRUE(refused({{"num_heads", 3}}));
  EXPECT_TRUE(refused({{"rope", "xpos"}}));
  EXPECT_TRUE(refused({{"head_dim", 6}, {"rotary_dim", 8}}));
  EXPECT_TRUE(refused({{"head_dim", 6}, {"rotary_dim", 3}}));
  EXPECT_TRUE(refused({{"window", -1}}));
  EXPECT_TRUE(refused({{"scale", 0}}));
  EXPECT_TRUE(refused({{"heads", 2}}));
  EXPECT_FALSE(refused({}));

  const auto mixer = layer({{"window", 0}});
  const auto state = mixer->make_state(2);
  EXPECT_ANY_THROW(mixer->forward(inputs(3, 4), {}, state.get()));
  EXPECT_ANY_THROW(mixer->forward(inputs(1, 4).narrow(2, 0, 8), {}, nullptr));
  EXPECT_ANY_THROW(mixer->forward(inputs(1, 4), {{0, 3, 2, 4}}, nullptr));
  EXPECT_ANY_THROW(mixer->forward(inputs(1, 4), {{0, 2, 5}}, state.get()));
  const TensorMap before = state->tensors();
  EXPECT_FALSE(state->restore({{"k", before.at("k")}}).ok());
  EXPECT_FALSE(state->restore({{"k", before.at("k")}, {"v", before.at("v").to(at::kFloat)}}).ok());
  EXPECT_FALSE(
      state->restore({{"k", before.at("k")}, {"v", at::zeros({2, 2, 3, 6}, at::kDouble)}}).ok());
  EXPECT_TRUE(state->restore(before).ok());
  state->positions() = {5, 5};  // a position without the rows that belong to it
  EXPECT_ANY_THROW(mixer->forward(inputs(2, 4), {}, state.get()));
}

}  // namespace
}  // namespace everlong::softmax
