// Timestep norms over the newest of a text: against the definition, token by token, and under any
// cut; and the control without a moving average.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <random>

#include "mechanisms/megalodon/layer.h"
#include "support/compare.h"

namespace everlong::megalodon {
namespace {

using test::relative_error;

constexpr std::int64_t kWidth = 12, kGroups = 3;
constexpr double kEps = 1e-5;
constexpr NormWindow kWindow{.tokens = 10, .blocks = 2};

// x [T, D]: of every token, mean and variance over all numbers of its group from the first token
// that counts to itself.
at::Tensor by_definition(const at::Tensor& x_TD, const NormWindow& window) {
  at::Tensor y = at::empty_like(x_TD);
  for (std::int64_t t = 0; t < x_TD.size(0); ++t) {
    const std::int64_t first =
        std::max<std::int64_t>(0, t / window.tokens - window.blocks) * window.tokens;
    const at::Tensor seen =
        x_TD.narrow(0, first, t + 1 - first).unflatten(1, {kGroups, kWidth / kGroups});
    const auto [var, mean] = at::var_mean(seen, at::IntArrayRef{0, 2}, /*correction=*/0);
    const at::Tensor here = x_TD[t].unflatten(0, {kGroups, kWidth / kGroups});
    y[t] = ((here - mean.unsqueeze(1)) * (var + kEps).rsqrt().unsqueeze(1)).flatten();
  }
  return y;
}

// A text whose mean and spread wander, around a value far from 0.
at::Tensor wandering(std::int64_t tokens) {
  const at::Tensor steps = at::randn({tokens, 1}, at::kDouble).cumsum(0);
  return 100 + 3 * steps + at::randn({tokens, kWidth}, at::kDouble) * (1 + steps.abs());
}

struct Plain {
  at::Tensor weight = at::zeros({kWidth}, at::kDouble), bias = at::zeros({kWidth}, at::kDouble);
  at::Tensor operator()(NormMemory& memory, const at::Tensor& x, Offsets offsets,
                        const std::vector<std::int64_t>& positions) const {
    return memory.forward(x, weight, bias, kEps, offsets, positions);
  }
};

TEST(MegalodonNormWindow, IsItsDefinition) {
  at::manual_seed(1);
  const Plain norm;
  const at::Tensor x = wandering(95);
  for (const NormWindow& window :
       {kWindow, NormWindow{.tokens = 1, .blocks = 1}, NormWindow{.tokens = 7, .blocks = 5}}) {
    NormMemory memory(1, kGroups, window, at::kCPU);
    const at::Tensor y = norm(memory, x.unsqueeze(0), {}, {0});
    EXPECT_LT(relative_error(y[0], by_definition(x, window)), 1e-10) << window.tokens;
  }
  // A window that nothing leaves is the whole text.
  NormMemory wide(1, kGroups, {.tokens = 10, .blocks = 50}, at::kCPU);
  NormMemory whole(1, kGroups, {}, at::kCPU);
  EXPECT_LT(
      relative_error(norm(wide, x.unsqueeze(0), {}, {0}), norm(whole, x.unsqueeze(0), {}, {0})),
      1e-12);
}

// Of texts in any phase, in any pieces: as rows, and packed.
TEST(MegalodonNormWindow, IsTheSameInAnyPieces) {
  at::manual_seed(2);
  std::mt19937_64 random(3);
  const Plain norm;
  std::vector<at::Tensor> texts, whole;
  for (int n = 0; n < 3; ++n) {
    texts.push_back(wandering(120));
    whole.push_back(by_definition(texts.back(), kWindow));
  }
  NormMemory memory(3, kGroups, kWindow, at::kCPU);
  std::vector<std::int64_t> at = {0, 0, 0};
  while (*std::ranges::max_element(at) < 80) {
    std::vector<std::int64_t> offsets = {0};
    std::vector<at::Tensor> parts, wanted;
    for (std::size_t n = 0; n < 3; ++n) {
      const auto length = static_cast<std::int64_t>(random() % 27);
      parts.push_back(texts[n].narrow(0, at[n], length));
      wanted.push_back(whole[n].narrow(0, at[n], length));
      offsets.push_back(offsets.back() + length);
    }
    const at::Tensor y = norm(memory, at::cat(parts).unsqueeze(0), offsets, at);
    EXPECT_LT(relative_error(y[0], at::cat(wanted)), 1e-10);
    for (std::size_t n = 0; n < 3; ++n) at[n] += offsets[n + 1] - offsets[n];
  }
  // The same memory goes on with rows, each in its own phase; a reordered copy too.
  const std::int64_t order[] = {2, 0};
  NormMemory picked = memory.select(order);
  std::vector<at::Tensor> rows, wanted;
  for (std::size_t n = 0; n < 3; ++n) {
    rows.push_back(texts[n].narrow(0, at[n], 14));
    wanted.push_back(whole[n].narrow(0, at[n], 14));
  }
  EXPECT_LT(relative_error(norm(picked, at::stack({rows[2], rows[0]}), {}, {at[2], at[0]}),
                           at::stack({wanted[2], wanted[0]})),
            1e-10);
  EXPECT_LT(relative_error(norm(memory, at::stack(rows), {}, at), at::stack(wanted)), 1e-10);
}

TEST(MegalodonNormWindow, ItsGradientIsTheDefinitionsThroughAnyPieces) {
  at::manual_seed(4);
  const Plain norm;
  const at::Tensor x = wandering(64).set_requires_grad(true), seed = at::randn({64, kWidth});
  const auto gradient = [&](const at::Tensor& y) {
    return torch::autograd::grad({(y * seed.to(at::kDouble)).sum()}, {x})[0];
  };
  std::vector<at::Tensor> tokens;  // the definition writes in place: build it differentiably
  for (std::int64_t t = 0; t < 64; ++t) {
    const std::int64_t first = std::max<std::int64_t>(0, t / 10 - 2) * 10;
    const at::Tensor seen = x.narrow(0, first, t + 1 - first).unflatten(1, {kGroups, 4});
    const auto [var, mean] = at::var_mean(seen, at::IntArrayRef{0, 2}, /*correction=*/0);
    tokens.push_back(
        ((x[t].unflatten(0, {kGroups, 4}) - mean.unsqueeze(1)) * (var + kEps).rsqrt().unsqueeze(1))
            .flatten());
  }
  const at::Tensor wanted = gradient(at::stack(tokens));
  NormMemory memory(1, kGroups, kWindow, at::kCPU);
  std::vector<at::Tensor> parts;
  std::int64_t begin = 0;
  for (const std::int64_t length : {3, 7, 25, 1, 0, 28}) {
    parts.push_back(norm(memory, x.narrow(0, begin, length).unsqueeze(0), {}, {begin})[0]);
    begin += length;
  }
  EXPECT_EQ(begin, 64);
  EXPECT_LT(relative_error(gradient(at::cat(parts)), wanted), 1e-9);
}

LayerSettings small_layer(const nlohmann::json& more = nlohmann::json::object()) {
  nlohmann::json settings = {{"num_heads", 2}, {"z_dim", 16},     {"value_dim", 48},
                             {"cema_ndim", 4}, {"chunk_size", 8}, {"norm_num_groups", 3}};
  settings.update(more);
  const auto read = read_settings({.hidden_size = 24, .settings = settings});
  EXPECT_TRUE(read.ok()) << read.status().message();
  return *read;
}

// The layer with a window: saved and restored inside a block, forked, and within its bound.
TEST(MegalodonNormWindow, TheLayersStateIsWhole) {
  at::manual_seed(5);
  GatedAttention layer(small_layer({{"norm_window", 4}}));
  layer.to(at::kDouble);
  const at::NoGradGuard off;
  const at::Tensor x = at::randn({2, 150, 24}, at::kDouble).cumsum(1);
  const at::Tensor whole = layer.forward(x, {}, nullptr);
  auto state = layer.make_state(2);
  const at::Tensor head = layer.forward(x.narrow(1, 0, 77), {}, state.get());
  EXPECT_LT(relative_error(head, whole.narrow(1, 0, 77)), 1e-10);
  EXPECT_LE(state->bytes(), state->bytes_bound(77));
  EXPECT_EQ(state->bytes_bound(1000), state->bytes_bound(100'000'000));
  EXPECT_EQ(state->tensors().at("norm.block_mean").sizes(), (std::vector<std::int64_t>{2, 2, 3}));
  auto fork = state->clone();
  auto restored = layer.make_state(2);
  ASSERT_TRUE(restored->restore(state->tensors()).ok());
  restored->positions() = state->positions();
  for (State* one : {state.get(), fork.get(), restored.get()})
    EXPECT_LT(relative_error(layer.forward(x.narrow(1, 77, 73), {}, one), whole.narrow(1, 77, 73)),
              1e-10);
  auto plain = layer.make_state(2);
  TensorMap lacking = state->tensors();
  lacking.erase("norm.block_var");
  EXPECT_FALSE(plain->restore(lacking).ok());
  // Without a window the same weights say something else far out, and the same before.
  GatedAttention everything(small_layer());
  everything.to(at::kDouble);
  auto mine = everything.named_parameters();
  for (const auto& item : layer.named_parameters()) mine[item.key()].set_data(item.value());
  const at::Tensor cumulative = everything.forward(x, {}, nullptr);
  EXPECT_LT(relative_error(cumulative.narrow(1, 0, 48), whole.narrow(1, 0, 48)), 1e-10);
  EXPECT_GT(relative_error(cumulative.narrow(1, 48, 102), whole.narrow(1, 48, 102)), 1e-3);
}

TEST(MegalodonNormWindow, OddWindowsAreRefused) {
  const auto read = read_settings({.hidden_size = 32, .settings = {{"norm_window", 3}}});
  ASSERT_FALSE(read.ok());
  EXPECT_NE(read.status().message().find("an even number"), std::string::npos);
}

// Nothing but the norm's statistics leaves a chunk when the average is off.
TEST(MegalodonWithoutAverage, NothingElseIsCarried) {
  at::manual_seed(6);
  GatedAttention layer(small_layer({{"moving_average", "off"}}));
  layer.to(at::kDouble);
  const at::NoGradGuard off;
  const at::Tensor x = at::randn({1, 40, 24}, at::kDouble);
  // In the first chunk every group's channels change places in time, so that its statistics stay.
  at::Tensor other = x.clone();
  other.narrow(1, 0, 8).copy_(x.narrow(1, 0, 8).flip(1));
  const at::Tensor a = layer.forward(x, {}, nullptr), b = layer.forward(other, {}, nullptr);
  EXPECT_LT(relative_error(a.narrow(1, 8, 32), b.narrow(1, 8, 32)), 1e-12);
  GatedAttention with(small_layer());
  with.to(at::kDouble);
  const at::Tensor c = with.forward(x, {}, nullptr), d = with.forward(other, {}, nullptr);
  EXPECT_GT(relative_error(c.narrow(1, 8, 8), d.narrow(1, 8, 8)), 1e-3);
  auto state = layer.make_state(1);
  const at::Tensor head = layer.forward(x.narrow(1, 0, 13), {}, state.get()),
                   tail = layer.forward(x.narrow(1, 13, 27), {}, state.get());
  EXPECT_LT(relative_error(at::cat({head, tail}, 1), a), 1e-11);
}

}  // namespace
}  // namespace everlong::megalodon
