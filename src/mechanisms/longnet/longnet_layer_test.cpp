// Layers of dilated attention and what they carry, beyond the laws' example.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "mechanisms/longnet/layer.h"
#include "support/compare.h"
#include "support/tolerance.h"

namespace everlong::longnet {
namespace {

using at::Tensor;
using nlohmann::json;

constexpr std::int64_t kWidth = 32;

Result<LayerSettings> settings_of(const json& more) {
  json settings = {{"num_heads", 4}, {"segment_length", {8, 16, 32}}, {"dilated_ratio", {1, 2, 4}}};
  settings.update(more);
  return read_settings({.hidden_size = kWidth, .num_layers = 2, .settings = settings});
}

std::shared_ptr<DilatedSelfAttention> layer_of(const json& more = json::object(),
                                               at::ScalarType dtype = at::kDouble) {
  const auto settings = settings_of(more);
  EXPECT_TRUE(settings.ok()) << settings.status().message();
  at::manual_seed(11);
  auto layer = std::make_shared<DilatedSelfAttention>(*settings);
  layer->to(dtype);
  return layer;
}

Tensor text(std::int64_t tokens, std::int64_t batch = 1, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(static_cast<std::uint64_t>(tokens));
  return at::randn({batch, tokens, kWidth}, at::kDouble).to(dtype);
}

Tensor fed(DilatedSelfAttention& layer, const Tensor& x, std::vector<std::int64_t> cuts,
           State* state) {
  cuts.push_back(x.size(1));
  std::vector<Tensor> parts;
  std::int64_t begin = 0;
  for (const std::int64_t cut : cuts) {
    parts.push_back(layer.forward(x.narrow(1, begin, cut - begin), {}, state));
    begin = cut;
  }
  return at::cat(parts, 1);
}

// What a layer may be: each kind streams as it runs in one pass.
const json kKinds[] = {
    json::object(),
    {{"segment_length", {8, 20, 50}}, {"dilated_ratio", {1, 3, 7}}},
    {{"beyond", "grow"}, {"num_kv_heads", 2}},
    {{"offset_rule", "block"}, {"dilated_ratio", {2, 4, 8}}},
    {{"form", "torchscale"}, {"rope", "xpos"}, {"xpos_scale_base", 16}},
    {{"form", "torchscale"}, {"subln", false}, {"mixing_grad", "detached"}},
    {{"rope", "interleaved"}, {"segment_length", {4, 4}}, {"dilated_ratio", {1, 1}}}};

TEST(LongnetLayer, AnyCutOfEveryKindIsOnePass) {
  const at::NoGradGuard off;
  for (const json& kind : kKinds)
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      const auto layer = layer_of(kind, dtype);
      const Tensor x = text(77, 2, dtype);
      const Tensor whole = layer->forward(x, {}, nullptr);
      std::vector<std::int64_t> single;
      for (std::int64_t t = 1; t < 77; ++t) single.push_back(t);
      // Trap 9: one token at a time, odd positions and positions past the first segment included.
      for (const auto& cuts : {std::vector<std::int64_t>{}, {5, 9, 16, 40, 41}, single}) {
        const auto state = layer->make_state(2);
        EXPECT_LT(test::relative_error(fed(*layer, x, cuts, state.get()), whole),
                  tolerance::split_of(dtype))
            << kind.dump() << " in " << cuts.size() + 1 << " pieces";
      }
    }
}

// Property 6: the rows are those of the formula and nothing else is held.
TEST(LongnetLayer, StateRowsAndBytesFollowTheFormula) {
  const at::NoGradGuard off;
  const auto layer =
      layer_of({{"segment_length", {64, 200, 1000}}, {"dilated_ratio", {1, 3, 10}}}, at::kFloat);
  const auto state = layer->make_state(1);
  auto& lattice = dynamic_cast<LatticeState&>(*state);
  std::int64_t position = 0;
  const std::int64_t all_rows = 64 + 67 + 100;  // ceil(w / r) of each
  for (const std::int64_t piece : {1, 1, 30, 31, 1, 1, 100, 500, 334, 1, 1, 999, 1, 2000}) {
    (void)layer->forward(text(piece, 1, at::kFloat), {}, state.get());
    position += piece;
    const auto rows = lattice.rows(0);
    const std::int64_t w[] = {64, 200, 1000}, r[] = {1, 3, 10};
    for (std::size_t i = 0; i < 3; ++i)
      for (std::int64_t head = 0; head < 4; ++head) {
        std::int64_t want = 0;  // counted, not computed
        for (std::int64_t p = (position - 1) / w[i] * w[i]; p < position; ++p)
          want += p % w[i] % r[i] == head % r[i];
        EXPECT_EQ(rows[i][static_cast<std::size_t>(head)], want);
        EXPECT_LE(want, (w[i] + r[i] - 1) / r[i]);
      }
    EXPECT_LE(state->bytes(), state->bytes_bound(position));
    EXPECT_LE(state->bytes(), 8 + all_rows * 4 * 2 * 8 * 4);
  }
  EXPECT_EQ(state->bytes(), 8 + all_rows * 4 * 2 * 8 * 4);  // heads, k and v, head dim, fp32
  EXPECT_EQ(state->bytes_bound(std::int64_t{1} << 50), state->bytes());
}

// Property 8 in a stream, and trap 12: at multiples of the longest segment all is forgotten.
TEST(LongnetLayer, AStreamRepeatsWithTheLongestSegment) {
  const at::NoGradGuard off;
  const auto layer = layer_of({{"rope", "none"}});
  const Tensor x = text(32);
  const auto state = layer->make_state(1);
  const Tensor first = layer->forward(x, {}, state.get());
  for (int i = 0; i < 5; ++i)
    EXPECT_LT(test::relative_error(layer->forward(x, {}, state.get()), first), 1e-12);
}

TEST(LongnetLayer, PositionsOfABillionAreAsGoodAsAny) {
  const at::NoGradGuard off;
  const auto layer = layer_of({{"rope", "none"}});
  const auto near = layer->make_state(1), far = layer->make_state(1);
  // 2^34 is a multiple of every segment: what follows is as at the start.
  far->positions() = {std::int64_t{1} << 34};
  TensorMap rows;
  for (const auto& [name, x] : far->tensors()) {
    const std::int64_t most = name.ends_with("0") ? 8 : name.ends_with("1") ? 8 : 8;
    rows[name] = at::zeros({1, 4, most, 8}, at::kDouble);
  }
  ASSERT_TRUE(far->restore(rows).ok());
  const Tensor x = text(50);
  EXPECT_LT(
      test::relative_error(fed(*layer, x, {7, 8, 9}, far.get()), fed(*layer, x, {20}, near.get())),
      1e-12);
}

TEST(LongnetLayer, BidirectionalLayersRunButCarryNothing) {
  const at::NoGradGuard off;
  const auto layer = layer_of({{"causal", false}, {"pad", "phantom"}});
  const Tensor x = text(41);
  Tensor other = x.clone();
  other.narrow(1, 40, 1).neg_();
  EXPECT_FALSE(test::same_bits(layer->forward(x, {}, nullptr).narrow(1, 32, 1),
                               layer->forward(other, {}, nullptr).narrow(1, 32, 1)));
  EXPECT_THROW((void)layer->make_state(1), c10::Error);
}

// Traps 7 and 13, and whatever else is not a setting.
TEST(LongnetLayer, WhatIsNotASettingIsRefusedByName) {
  const std::pair<const char*, json> wrong[] = {{"attention_dropout", 0.1},
                                                {"segment_length", "[16,32,64]"},
                                                {"dilated_ratio", {1, 2}},
                                                {"dilated_ratio", {1, 2, 0}},
                                                {"segment_length", {8, 16, 2.5}},
                                                {"offset_rule", "spread"},
                                                {"beyond", "sliding"},
                                                {"num_kv_heads", 3},
                                                {"subln", true},
                                                {"block_shift", true}};
  for (const auto& [key, value] : wrong) {
    const auto settings = settings_of({{key, value}});
    ASSERT_FALSE(settings.ok()) << key << " = " << value.dump();
    EXPECT_NE(settings.status().message().find(key), std::string::npos)
        << settings.status().message();
  }
  EXPECT_FALSE(settings_of({{"beyond", "grow"}, {"segment_length", {32, 16, 8}}}).ok());
}

// Trap 14: a second layer knows nothing of the first.
TEST(LongnetLayer, SettingsOfOneLayerDoNotReachAnother) {
  const at::NoGradGuard off;
  const Tensor x = text(40);
  const Tensor before = layer_of()->forward(x, {}, nullptr);
  const auto other = layer_of({{"segment_length", {4}}, {"dilated_ratio", {2}}});
  EXPECT_FALSE(test::same_bits(other->forward(x, {}, nullptr), before));
  EXPECT_TRUE(test::same_bits(layer_of()->forward(x, {}, nullptr), before));
}

TEST(LongnetLayer, SaysWhichPathItTakes) {
  EXPECT_EQ(layer_of(json::object(), at::kFloat)->path(at::kCPU), "cpu kernel");
  EXPECT_EQ(layer_of()->path(at::kCPU), "composite (ATen)");
  EXPECT_EQ(layer_of({{"rope", "xpos"}}, at::kFloat)->path(at::kCPU), "composite (ATen)");
}

// A graph through the state survives what is done to the state afterwards without one.
TEST(LongnetLayer, StepsWithoutAGraphDoNotDisturbOneThatIsKept) {
  const auto layer = layer_of();
  const Tensor x = text(30).set_requires_grad(true);
  const auto gradient = [&](bool more) {
    const auto state = layer->make_state(1);
    (void)layer->forward(x.narrow(1, 0, 20), {}, state.get());
    const Tensor y = layer->forward(x.narrow(1, 20, 10), {}, state.get());
    if (more) {
      const at::NoGradGuard off;
      (void)layer->forward(text(9), {}, state.get());
    }
    x.mutable_grad() = Tensor();
    y.sum().backward();
    return x.grad().clone();
  };
  EXPECT_TRUE(test::same_bits(gradient(true), gradient(false)));
}

}  // namespace
}  // namespace everlong::longnet
