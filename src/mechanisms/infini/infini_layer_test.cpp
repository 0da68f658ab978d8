#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "mechanisms/infini/layer.h"
#include "mechanisms/infini/layer_mass.h"

namespace everlong::infini {
namespace {

constexpr std::int64_t kWidth = 16;

std::shared_ptr<InfiniAttention> layer(nlohmann::json settings,
                                       at::ScalarType dtype = at::kDouble) {
  at::manual_seed(11);
  nlohmann::json all = {{"num_heads", 4}, {"num_kv_heads", 2}, {"head_dim", 6}, {"segment", 8}};
  if (!settings.is_null()) all.update(settings);
  auto read = read_settings({.hidden_size = kWidth, .num_layers = 2, .settings = all});
  EXPECT_TRUE(read.ok()) << read.status().message();
  auto made = std::make_shared<InfiniAttention>(*read);
  made->to(dtype);
  return made;
}

at::Tensor text(std::int64_t tokens, std::int64_t batch = 1, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(static_cast<std::uint64_t>(100 * batch + tokens));
  return at::randn({batch, tokens, kWidth}, at::kDouble).to(dtype);
}

double error(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>() / std::max(b.abs().max().item<double>(), 1e-30);
}

TEST(InfiniLayer, EqualsALlamaLayerOverOneSegmentBitForBit) {
  const auto infini = layer({{"segment", 32}}, at::kFloat);
  const auto room = find_mechanism("softmax");
  ASSERT_TRUE(room.ok());
  auto made =
      (*room)->make_layer({.hidden_size = kWidth,
                           .num_layers = 2,
                           .settings = {{"num_heads", 4}, {"num_kv_heads", 2}, {"head_dim", 6}}});
  ASSERT_TRUE(made.ok()) << made.status().message();
  Mixer& llama = **made;
  const at::NoGradGuard no_grad;
  for (auto& item : llama.named_parameters())
    item.value().copy_(infini->named_parameters()[item.key()]);
  for (const std::int64_t tokens : {1, 20, 32}) {
    const at::Tensor x = text(tokens, 2, at::kFloat);
    EXPECT_TRUE(at::equal(infini->forward(x, {}, nullptr), llama.forward(x, {}, nullptr)));
    // And token by token: memory is not read before it is written.
    const auto mine = infini->make_state(2);
    const auto theirs = llama.make_state(2);
    for (std::int64_t t = 0; t < tokens; ++t)
      EXPECT_LE(error(infini->forward(x.narrow(1, t, 1), {}, mine.get()),
                      llama.forward(x.narrow(1, t, 1), {}, theirs.get())),
                1e-6);
  }
}

TEST(InfiniLayer, AnyCutOfATextIsTheSameText) {
  for (const char* update : {"linear", "delta"}) {
    const at::NoGradGuard no_grad;
    const auto mixer = layer({{"update", update}});
    const at::Tensor x = text(50);
    const at::Tensor whole = mixer->forward(x, {}, nullptr);
    for (const std::int64_t piece : {1, 3, 7, 8, 9, 16, 49}) {
      auto state = mixer->make_state(1);
      std::vector<at::Tensor> parts;
      for (std::int64_t t = 0; t < 50; t += piece) {
        // Saved and restored in the middle of segments.
        auto loaded = mixer->make_state(1);
        ASSERT_TRUE(loaded->restore(state->tensors()).ok());
        loaded->positions() = state->positions();
        state = std::move(loaded);
        parts.push_back(mixer->forward(x.narrow(1, t, std::min(piece, 50 - t)), {}, state.get()));
      }
      EXPECT_LE(error(at::cat(parts, 1), whole), 1e-12) << update << " pieces of " << piece;
      EXPECT_EQ(state->positions().front(), 50);
    }
  }
}

TEST(InfiniLayer, MemoryIsWrittenAtSegmentEndsOnly) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({});
  const auto state = mixer->make_state(1);
  auto& mine = static_cast<InfiniState&>(*state);
  const at::Tensor x = text(24);
  for (std::int64_t t = 0; t < 24; ++t) {
    const at::Tensor before = mine.M().clone();
    (void)mixer->forward(x.narrow(1, t, 1), {}, state.get());
    EXPECT_EQ(at::equal(before, mine.M()), (t + 1) % 8 != 0) << t;
    EXPECT_EQ(
        state->tensors().at("k").narrow(1, (t + 1) % 8, 8 - (t + 1) % 8).abs().sum().item<double>(),
        0);
  }
}

TEST(InfiniLayer, RaggedSequencesCloseTheirSegmentsOnTheirOwn) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({{"update", "delta"}});
  const auto together = mixer->make_state(2);
  const at::Tensor a = text(30), b = text(31);
  // 5 + 12 and 11 + 0 tokens: one closes two segments, the other one.
  (void)mixer->forward(at::cat({a.narrow(1, 0, 5), b.narrow(1, 0, 11)}, 1), {{0, 5, 16}},
                       together.get());
  const at::Tensor out = mixer->forward(a.narrow(1, 5, 12), {{0, 12, 12}}, together.get());
  const auto alone = mixer->make_state(1);
  const at::Tensor expected = mixer->forward(a.narrow(1, 0, 17), {}, alone.get());
  EXPECT_LE(error(out, expected.narrow(1, 5, 12)), 1e-12);
  EXPECT_LE(error(together->tensors().at("M")[0], alone->tensors().at("M")[0]), 1e-12);
  EXPECT_EQ(together->positions(), (std::vector<std::int64_t>{17, 11}));
}

TEST(InfiniLayer, AForkGoesItsOwnWayAndAResetForgets) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({});
  const auto state = mixer->make_state(2);
  (void)mixer->forward(text(21, 2), {}, state.get());
  const auto fork = state->clone();
  const at::Tensor before = state->tensors().at("v").clone();
  (void)mixer->forward(text(2, 2), {}, fork.get());
  EXPECT_TRUE(at::equal(state->tensors().at("v"), before));
  // A restored state takes the tensors it is given, and writes into copies.
  const auto restored = mixer->make_state(2);
  ASSERT_TRUE(restored->restore(state->tensors()).ok());
  restored->positions() = state->positions();
  (void)mixer->forward(text(2, 2), {}, restored.get());
  EXPECT_TRUE(at::equal(state->tensors().at("v"), before));
  const auto reset = state->select(std::vector<std::int64_t>{1, -1});
  EXPECT_EQ(reset->positions(), (std::vector<std::int64_t>{21, 0}));
  EXPECT_EQ(reset->tensors().at("z")[1].abs().sum().item<double>(), 0);
}

TEST(InfiniLayer, StatesOfTheLinearRuleMerge) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({});
  const at::Tensor first = text(16), second = text(24);
  const auto whole = mixer->make_state(1), a = mixer->make_state(1), b = mixer->make_state(1);
  (void)mixer->forward(at::cat({first, second}, 1), {}, whole.get());
  (void)mixer->forward(first, {}, a.get());
  (void)mixer->forward(second, {}, b.get());
  auto& merged = static_cast<InfiniState&>(*b);
  ASSERT_TRUE(merged.merge(static_cast<InfiniState&>(*a)).ok());
  const at::Tensor next = text(5);
  EXPECT_LE(error(mixer->forward(next, {}, b.get()), mixer->forward(next, {}, whole.get())), 1e-12);

  const auto delta = layer({{"update", "delta"}});
  const auto c = delta->make_state(1), d = delta->make_state(1);
  EXPECT_FALSE(static_cast<InfiniState&>(*c).merge(static_cast<InfiniState&>(*d)).ok());
  const auto wider = layer({{"head_dim", 4}})->make_state(1);
  EXPECT_FALSE(merged.merge(static_cast<InfiniState&>(*wider)).ok());
}

TEST(InfiniLayer, BytesAreTheFormulasAndDoNotGrow) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({}, at::kFloat);
  const auto state = mixer->make_state(3);
  // M and z in fp32; C rows of keys, values and weights; 8 bytes of position.
  const auto expected =
      static_cast<std::int64_t>(3 * (memory_bytes(2, 6, 6) + 8 * (2 * 2 * 6 + 1) * 4 + 8));
  EXPECT_EQ(state->bytes(), expected);
  for (int i = 0; i < 40; ++i) (void)mixer->forward(text(13, 3, at::kFloat), {}, state.get());
  EXPECT_EQ(state->bytes(), expected);
  EXPECT_EQ(state->bytes_bound(1 << 30), expected);
}

TEST(InfiniLayer, WriteWeightsReachMemoryThroughEveryCall) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({});
  const at::Tensor x = text(16);
  at::Tensor weight = at::ones({1, 16}, at::kDouble);
  weight.narrow(1, 3, 4).fill_(100);
  const auto whole = mixer->make_state(1), pieces = mixer->make_state(1),
             plain = mixer->make_state(1);
  (void)mixer->forward(x, {}, plain.get());
  mixer->set_write_weight(weight);
  (void)mixer->forward(x, {}, whole.get());
  for (std::int64_t t = 0; t < 16; t += 2) {
    mixer->set_write_weight(weight.narrow(1, t, 2));
    (void)mixer->forward(x.narrow(1, t, 2), {}, pieces.get());
  }
  EXPECT_LE(error(pieces->tensors().at("M"), whole->tensors().at("M")), 1e-13);
  EXPECT_GT(error(plain->tensors().at("M"), whole->tensors().at("M")), 0.1);
  EXPECT_THROW((void)mixer->forward(text(5), {}, nullptr), std::exception);
}

// Segments here all have positions 0 to 7, so a segment fed again writes the same keys and values.
TEST(InfiniLayer, AWriteWeightIsSoManyWritesForTheLinearRuleOnly) {
  const at::NoGradGuard no_grad;
  const at::Tensor segment = text(8), next = text(13);
  at::Tensor weight = at::ones({1, 8}, at::kDouble), others = at::zeros({1, 8}, at::kDouble);
  weight.narrow(1, 2, 5).fill_(4);
  others.narrow(1, 2, 5).fill_(1);
  for (const auto& [update, same] : {std::pair{"linear", true}, {"delta", false}}) {
    const auto mixer = layer({{"update", update}});
    const auto weighed = mixer->make_state(1), repeated = mixer->make_state(1);
    mixer->set_write_weight(weight);
    (void)mixer->forward(segment, {}, weighed.get());
    for (int times = 0; times < 4; ++times) {
      mixer->set_write_weight(times == 0 ? at::ones({1, 8}, at::kDouble) : others);
      (void)mixer->forward(segment, {}, repeated.get());
    }
    mixer->set_write_weight({});
    const double apart =
        error(mixer->forward(next, {}, weighed.get()), mixer->forward(next, {}, repeated.get()));
    if (same)
      EXPECT_LE(apart, 1e-13);  // sums of a few dozen fp64 numbers in another order
    else
      EXPECT_GT(apart, 1e-3);
  }
}

TEST(InfiniLayer, PackedSequencesWithoutStateEqualEachAlone) {
  // Lengths near each other (side by side), far from each other (one by one), empty ones, one
  // alone.
  for (const auto& offsets : std::vector<std::vector<std::int64_t>>{
           {0, 20, 37, 37, 60}, {0, 3, 60}, {0, 0, 60}, {0, 30, 60}, {0, 0, 0, 60, 60}})
    for (const bool weighed : {false, true}) {
      const auto mixer = layer({{"update", "delta"}});
      const at::Tensor x = text(60), weight = at::arange(1, 61, at::kDouble).view({1, 60}) / 20;
      const at::Tensor gradient = at::randn({1, 60, kWidth}, at::kDouble);
      const auto differentiated = [&](const auto& run) {
        at::Tensor input = x.clone().requires_grad_(true);
        mixer->zero_grad();
        const at::Tensor out = run(input);
        out.backward(gradient);
        std::vector<at::Tensor> all = {out.detach(), input.grad()};
        for (const auto& parameter : mixer->parameters()) all.push_back(parameter.grad().clone());
        return all;
      };
      const auto packed = differentiated([&](const at::Tensor& input) {
        mixer->set_write_weight(weighed ? weight : at::Tensor());
        return mixer->forward(input, {offsets}, nullptr);
      });
      const auto alone = differentiated([&](const at::Tensor& input) {
        std::vector<at::Tensor> parts;
        for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
          const std::int64_t begin = offsets[n], tokens = offsets[n + 1] - begin;
          if (tokens == 0) continue;
          mixer->set_write_weight(weighed ? weight.narrow(1, begin, tokens) : at::Tensor());
          parts.push_back(mixer->forward(input.narrow(1, begin, tokens), {}, nullptr));
        }
        return at::cat(parts, 1);
      });
      for (std::size_t i = 0; i < alone.size(); ++i)
        EXPECT_LE(error(packed[i], alone[i]), 1e-11) << i << " of " << offsets.size();
    }
}

TEST(InfiniLayer, MassesAreSumsOfKeyFeatures) {
  const at::NoGradGuard no_grad;
  const auto mixer = layer({});
  const auto state = mixer->make_state(1);
  const auto masses = [&] { return slot_masses(state->tensors().at("z")[0]); };
  EXPECT_EQ(masses().at(1).mean, 0);
  EXPECT_EQ(masses().at(1).contrast(), 1);
  EXPECT_EQ(masses().at(1).best_share(), 1);
  const at::Tensor x = text(19);  // two segments of 8, and three tokens not written yet
  (void)mixer->forward(x, {}, state.get());
  const at::Tensor k = at::linear(x, mixer->named_parameters()["k_proj.weight"]);
  const at::Tensor written = at::elu(k.narrow(1, 0, 16)).add(1).sum(1).view({2, 6});
  ASSERT_EQ(masses().size(), 2U);
  for (const std::int64_t head : {0, 1}) {
    const SlotMass mass = masses()[static_cast<std::size_t>(head)];
    EXPECT_NEAR(mass.mean, written[head].mean().item<double>(), 1e-11);
    EXPECT_NEAR(mass.smallest, written[head].min().item<double>(), 1e-11);
    EXPECT_NEAR(mass.largest, written[head].max().item<double>(), 1e-11);
    EXPECT_NEAR(mass.contrast(), mass.largest / mass.smallest, 1e-12);
    EXPECT_NEAR(mass.best_share(), 1 / (1 + mass.smallest), 1e-12);
  }
  EXPECT_THROW((void)slot_masses(state->tensors().at("z")), std::exception);
}

TEST(InfiniLayer, GatesHaveOneDimensionAndTheirValuesAreShares) {
  for (const auto& [granularity, count] : {std::pair{"head", 4}, {"layer", 1}, {"channel", 24}}) {
    const auto mixer = layer({{"gate_granularity", granularity}, {"gate_init", -3}});
    const at::Tensor gate = mixer->named_parameters()["gate"];
    EXPECT_EQ(gate.dim(), 1);  // the optimiser decays what has two
    EXPECT_EQ(gate.numel(), count);
    EXPECT_NEAR(mixer->gate_values().max().item<double>(), 1 / (1 + std::exp(3.0)), 1e-6);
    EXPECT_EQ(mixer->forward(text(20), {}, nullptr).size(1), 20);
  }
}

TEST(InfiniLayer, WithMemoryOffOnlyTheOwnSegmentCounts) {
  const at::NoGradGuard no_grad;
  const auto on = layer({}), off = layer({{"memory", "off"}});
  const at::Tensor x = text(20);
  at::Tensor other = x.clone();
  other.narrow(1, 0, 8).mul_(-1);  // another first segment
  const auto later = [&](InfiniAttention& mixer, const at::Tensor& input) {
    return mixer.forward(input, {}, nullptr).narrow(1, 8, 12);
  };
  EXPECT_TRUE(at::equal(later(*off, x), later(*off, other)));
  EXPECT_GT(error(later(*on, x), later(*on, other)), 1e-3);
}

TEST(InfiniLayer, SettingsThatCannotTrainAreRefused) {
  for (const nlohmann::json& wrong :
       {nlohmann::json{{"gate_init", 10}}, nlohmann::json{{"segment", 0}},
        nlohmann::json{{"delta_z", "armt"}}, nlohmann::json{{"head_dim", 5}},
        nlohmann::json{{"num_kv_heads", 3}}, nlohmann::json{{"update", "hebb"}}}) {
    nlohmann::json all = {{"num_heads", 4}};
    all.update(wrong);
    const auto read = read_settings({.hidden_size = kWidth, .num_layers = 2, .settings = all});
    EXPECT_FALSE(read.ok()) << wrong.dump();
  }
}

}  // namespace
}  // namespace everlong::infini
