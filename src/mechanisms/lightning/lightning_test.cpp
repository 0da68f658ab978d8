// The tensor forms and the layer. The reference has a test of its own, and the laws
// (tests/conformance) hold every form to random splits, poison, strides and refusals; here is what
// they do not reach.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "core/safetensors.h"
#include "mechanisms/lightning/layer.h"
#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/op_plan.h"
#include "support/compare.h"
#include "support/tolerance.h"

namespace everlong::lightning {
namespace {

using test::relative_error;

struct Wanted {
  std::int64_t batch = 1, tokens = 65, key_dim = 6, value_dim = 5;
  std::vector<double> slope = {0.84, 0.2, 0.02, 1e-5};
  std::vector<std::int64_t> cu_seqlens = {};
  bool state = true;
};

OpCall random_call(const Wanted& w, bool gradients = true) {
  const auto H = static_cast<std::int64_t>(w.slope.size());
  const std::int64_t T = w.cu_seqlens.empty() ? w.tokens : w.cu_seqlens.back();
  const std::int64_t N =
      w.cu_seqlens.empty() ? w.batch : static_cast<std::int64_t>(w.cu_seqlens.size()) - 1;
  const auto draw = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); };
  OpCall call;
  call.inputs = {{"q", draw({w.batch, T, H, w.key_dim})},
                 {"k", draw({w.batch, T, H, w.key_dim})},
                 {"v", draw({w.batch, T, H, w.value_dim})},
                 {"slope", at::tensor(w.slope, at::kDouble)}};
  call.cu_seqlens = w.cu_seqlens;
  call.params["scale"] = 0.7;
  if (w.state) call.state["S"] = draw({N, H, w.key_dim, w.value_dim});
  if (gradients)
    call.grad_out = {{"o", draw({w.batch, T, H, w.value_dim})},
                     {"state.S", draw({N, H, w.key_dim, w.value_dim})}};
  return call;
}

void expect_equal(const OpCall& call, std::string_view form, double allowed,
                  const std::string& what) {
  const auto expected = attention_operator().run("reference", call),
             actual = attention_operator().run(form, call);
  ASSERT_TRUE(expected.ok()) << expected.status().message();
  ASSERT_TRUE(actual.ok()) << actual.status().message();
  const auto compare = [&](const char* kind, const TensorMap& a, const TensorMap& b) {
    for (const auto& [name, t] : b) {
      ASSERT_TRUE(a.contains(name)) << what << ": no " << kind << name;
      EXPECT_LE(relative_error(a.at(name), t), allowed) << what << ": " << kind << name;
    }
  };
  compare("out.", actual->out, expected->out);
  compare("state.", actual->state, expected->state);
  compare("grad.", actual->grad, expected->grad);
}

class Lightning : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(1); }
};

// Around the chunk (32) and the block (256); a short first chunk takes what is left over (trap: the
// tail's true length).
TEST_F(Lightning, CompositeEqualsReferenceAtEveryLength) {
  for (const std::int64_t tokens : {0, 1, 2, 31, 32, 33, 64, 65, 255, 256, 257, 320, 577, 1000})
    for (const bool state : {false, true})
      expect_equal(random_call({.batch = 2, .tokens = tokens, .state = state}), "composite",
                   tolerance::kFormsFloat64, cat(tokens, " tokens", state ? ", state" : ""));
}

TEST_F(Lightning, CompositeEqualsReferenceAtExtremeSlopes) {
  for (const std::int64_t tokens : {1, 65, 300})
    expect_equal(random_call({.tokens = tokens, .slope = {80, 8, 0.917, 4e-8, 0}}), "composite",
                 tolerance::kFormsFloat64, cat(tokens, " tokens"));
}

TEST_F(Lightning, PackedSequencesOfAnyLengths) {
  const std::vector<std::vector<std::int64_t>> lines = {
      {0, 1000, 1000, 1001, 1065, 1066, 1130,
       1194},                          // long, empty, one token, a chunk and one, ...
      {0, 64, 192, 256, 257},          // nothing left over but the last
      {0, 3, 5, 6, 7, 7, 12, 20, 21},  // all shorter than a chunk
      {0, 70, 140, 210},               // all of one length
      {0, 1, 2, 3},                    // one token each
      {0, 0, 130},
      {0, 0, 0}};
  for (const auto& line : lines)
    for (const bool state : {false, true})
      expect_equal(random_call({.cu_seqlens = line, .state = state}), "composite",
                   tolerance::kFormsFloat64, cat("to ", line.back(), state ? ", state" : ""));
}

TEST_F(Lightning, ManyRowsAreCutIntoBlocks) {
  expect_equal(random_call({.batch = 11, .tokens = 130, .slope = {0.5, 0.001}}), "composite",
               tolerance::kFormsFloat64, "11 rows");
  std::vector<std::int64_t> line = {0};
  for (std::int64_t n = 0; n < 40; ++n) line.push_back(line.back() + (n * 37) % 150);
  expect_equal(random_call({.slope = {0.5, 0.001}, .cu_seqlens = line}), "composite",
               tolerance::kFormsFloat64, "40 sequences");
}

TEST_F(Lightning, NaiveEqualsReference) {
  expect_equal(random_call({.batch = 2, .tokens = 70}), "naive", tolerance::kFormsFloat64, "rows");
  expect_equal(random_call({.cu_seqlens = {0, 5, 5, 70}}), "naive", tolerance::kFormsFloat64,
               "packed");
}

TEST_F(Lightning, LowPrecisionAccumulatesInFloat32) {
  OpCall call = random_call(
      {.batch = 2, .tokens = 1000, .key_dim = 32, .value_dim = 24, .slope = {0.1, 4e-8, 8}}, false);
  for (const auto& [dtype, allowed] :
       {std::pair{at::kFloat, 5e-6},      // sums of 1000 products of size 1 in fp32
        std::pair{at::kBFloat16, 4e-3}})  // one rounding of the result, 2^-8
  {
    OpCall given = call;
    for (const char* name : {"q", "k", "v"}) given.inputs[name] = call.inputs.at(name).to(dtype);
    given.state["S"] = call.state.at("S").to(at::kFloat);
    const auto actual = attention_operator().run("composite", given);
    ASSERT_TRUE(actual.ok()) << actual.status().message();
    EXPECT_EQ(actual->out.at("o").scalar_type(), dtype);
    EXPECT_EQ(actual->state.at("S").scalar_type(), at::kFloat);
    for (auto* tensors : {&given.inputs, &given.state})
      for (auto& [name, t] : *tensors) t = t.to(at::kDouble);
    const auto expected = attention_operator().run("reference", given);
    EXPECT_LE(relative_error(actual->out.at("o"), expected->out.at("o")), allowed) << dtype;
    EXPECT_LE(relative_error(actual->state.at("S"), expected->state.at("S")), 5e-6)
        << dtype;  // never rounded to bf16
  }
}

// Trap: fp32 knows no number between 1 and 1 - 6e-8, so a slope of 4e-8 applied as a factor would
// act as 6e-8.
TEST_F(Lightning, SlowestPublishedDecaySurvivesSingleSteps) {
  const at::NoGradGuard no_grad;
  constexpr std::int64_t kTokens = 32768;
  const Decay decay({4e-8}, 1.0);
  const at::Tensor k = 0.1 * at::randn({1, kTokens, 1, 4}), v = 0.1 * at::randn({1, kTokens, 1, 4});
  const at::Tensor start = at::ones({1, 1, 4, 4});
  at::Tensor state = start;
  for (std::int64_t t = 0; t < kTokens; ++t)
    state = decay_linear_attention(k.narrow(1, t, 1), k.narrow(1, t, 1), v.narrow(1, t, 1), decay,
                                   {}, state)
                .state_NHKV;
  const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
  const auto expected =
      decay_linear_attention(wide(k), wide(k), wide(v), decay, {}, wide(start)).state_NHKV;
  // Rounding alone walks about sqrt(32768) * 3e-8 = 5e-6; the wrong decay would be off by 2e-8 *
  // 32768 = 7e-4.
  EXPECT_LE(relative_error(state, expected), 5e-5);
}

// On the CPU the fusion is ATen operations around the kernel: the same bits, and nothing that is
// not wanted.
TEST_F(Lightning, AFusionIsTheOperationsAroundIt) {
  const at::Tensor q = at::randn({2, 40, 3, 8}), k = at::randn({2, 40, 3, 8}),
                   v = at::randn({2, 40, 3, 16});
  const Decay decay({0.5, 0.1, 0}, 0.7);
  const Attention got =
      decay_linear_attention(q, k, v, decay, {}, std::nullopt, Path::kAuto,
                             {.silu_q = true, .silu_v = true, .row_squares = true});
  const Attention wanted = decay_linear_attention(at::silu(q), k, at::silu(v), decay);
  EXPECT_TRUE(at::equal(got.o_BTHV, wanted.o_BTHV));
  EXPECT_TRUE(at::equal(got.state_NHKV, wanted.state_NHKV));
  EXPECT_TRUE(at::allclose(got.row_squares_BTH, wanted.o_BTHV.square().sum(-1)));
  const Attention bare =
      decay_linear_attention(q, k, v, decay, {}, std::nullopt, Path::kAuto, {.final_state = false});
  EXPECT_FALSE(bare.state_NHKV.defined() || bare.row_squares_BTH.defined());
}

TEST_F(Lightning, GradientFlowsThroughTheStateAlone) {
  OpCall call = random_call({.batch = 2, .tokens = 70});
  call.grad_out.erase("o");
  expect_equal(call, "composite", tolerance::kFormsFloat64, "only the final state");
  call = random_call({.batch = 2, .tokens = 1});
  call.grad_out.erase("state.S");
  expect_equal(call, "composite", tolerance::kFormsFloat64, "only o, one token");
}

TEST_F(Lightning, NanStaysInItsSequence) {
  OpCall call = random_call({.cu_seqlens = {0, 3, 80, 90, 290}}, false);
  const auto healthy = attention_operator().run("composite", call);
  call.inputs["k"] = call.inputs["k"].clone();
  call.inputs["k"].narrow(1, 3, 77).fill_(std::nan(""));
  const auto sick = attention_operator().run("composite", call);
  const auto rest = [](const at::Tensor& o) {
    return at::cat({o.narrow(1, 0, 3), o.narrow(1, 80, 210)}, 1);
  };
  EXPECT_TRUE(test::same_bits(rest(sick->out.at("o")), rest(healthy->out.at("o"))));
  EXPECT_TRUE(sick->out.at("o").narrow(1, 3, 77).isnan().all().item<bool>());
  EXPECT_TRUE(
      test::same_bits(sick->state.at("S").narrow(0, 2, 2), healthy->state.at("S").narrow(0, 2, 2)));
}

TEST_F(Lightning, BadArgumentsThrowBeforeAnyWork) {
  const at::Tensor x = at::randn({1, 4, 2, 3});
  EXPECT_THROW(decay_linear_attention(x, x, x, Decay({0.1}, 1.0)), c10::ValueError);
  EXPECT_THROW(decay_linear_attention(x, x, x, Decay({0.1, -0.1}, 1.0)), c10::ValueError);
  EXPECT_THROW(decay_linear_attention(x, x, x, Decay({0.1, 0.1}, 1.0), {0, 5}), c10::ValueError);
  EXPECT_THROW(decay_linear_attention(x, x, x, Decay({0.1, 0.1}, 1.0), {}, at::zeros({2, 2, 3, 3})),
               c10::ValueError);
}

TEST(LightningPlan, EveryTokenOnceInOrder) {
  const PlanLimits limits{.chunk = 8, .group = 3, .tokens = 32};
  const std::vector<std::int64_t> line = {0, 100, 100, 101, 109, 126, 126, 150, 151};
  const Plan plan = plan_packed(line, limits);
  std::vector<int> seen(151, 0);
  std::vector<std::int64_t> last(static_cast<std::size_t>(plan.rows), -1);
  for (const Block& b : plan.blocks) {
    EXPECT_TRUE(b.ranks <= limits.group && b.chunk <= limits.chunk &&
                (b.ranks == 1 || b.chunk == limits.chunk));
    for (std::int64_t row = 0; row < b.rows; ++row)
      for (std::int64_t i = 0; i < b.ranks * b.chunk; ++i) {
        const std::int64_t token =
            plan.slot_token[static_cast<std::size_t>(b.first + row * b.ranks * b.chunk + i)];
        const bool padding =
            !b.length.empty() && i < b.chunk - b.length[static_cast<std::size_t>(row)];
        ASSERT_EQ(token == 151, padding);
        if (padding) continue;
        ++seen[static_cast<std::size_t>(token)];
        const auto r = static_cast<std::size_t>(b.row + row),
                   n = static_cast<std::size_t>(plan.order[r]);
        EXPECT_TRUE(line[n] <= token && token < line[n + 1])
            << "token " << token << " in another sequence";
        EXPECT_EQ(token, last[r] < 0 ? line[n] : last[r] + 1);
        last[r] = token;
      }
  }
  EXPECT_EQ(std::ranges::count(seen, 1), 151);
}

TEST(LightningPlan, UnevenLengthsCostNoMoreThanAChunkEach) {
  std::vector<std::int64_t> line = {0, 100000};
  for (std::int64_t n = 0; n < 3000; ++n) line.push_back(line.back() + 1 + n % 3);
  const PlanLimits limits{.chunk = 64, .group = 8, .tokens = 512};
  const Plan plan = plan_packed(line, limits);
  EXPECT_LE(plan.slot_token.size(), static_cast<std::size_t>(line.back()) + 3000 * 2 + 64 * 64);
  EXPECT_LE(plan.blocks.size(), 300U);
}

LayerSpec spec_of(std::int64_t hidden, nlohmann::json settings, std::int64_t layer = 0,
                  std::int64_t layers = 4) {
  LayerSpec spec;
  spec.hidden_size = hidden;
  spec.layer_index = layer;
  spec.num_layers = layers;
  spec.settings = std::move(settings);
  return spec;
}
std::shared_ptr<Mixer> make(const LayerSpec& spec) {
  auto made = make_layer(spec);
  TORCH_CHECK(made.ok(), made.status().message());
  return std::move(made).value();
}

// Golden layers: what the published NormLinearAttention and MiniMaxLightningAttention compute
// (tests/golden/README.md).
class GoldenLayer : public testing::TestWithParam<const char*> {};

TEST_P(GoldenLayer, EqualsThePublishedCode) {
  const auto file =
      SafetensorsFile::open(fs::path(EVERLONG_TEST_DATA) / "golden/lightning" / GetParam());
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto params = nlohmann::json::parse(file->metadata().at("params"));
  const auto tensor = [&](const std::string& name) {
    const TensorEntry& entry = file->tensors().at(name);
    at::Tensor out = at::empty(entry.shape, at::kDouble);
    std::memcpy(out.data_ptr(), entry.bytes.data(), entry.bytes.size());
    return out;
  };
  const at::Tensor x = tensor("in.x").set_requires_grad(true);
  const bool minimax = file->metadata().at("kind") == "minimax_lightning_layer";
  const auto mixer = make(spec_of(x.size(2),
                                  {{"form", minimax ? "minimax" : "transnormer"},
                                   {"num_heads", params["n_heads"]},
                                   {"head_dim", params["head_dim"]},
                                   {"slope_rule", params["slope_rule"]},
                                   {"activation", params["act"]},
                                   {"norm_eps", params["norm_eps"]},
                                   {"lrpe", params.value("lrpe", false) ? "all" : "none"}},
                                  params["layer_idx"], params["n_layers"]));
  mixer->to(at::kDouble);
  std::size_t weights = 0;
  for (const auto& [name, entry] : file->tensors()) weights += name.starts_with("w.") ? 1 : 0;
  ASSERT_EQ(mixer->named_parameters().size(), weights);
  {
    const at::NoGradGuard no_grad;
    for (auto& parameter : mixer->named_parameters())
      parameter.value().copy_(tensor("w." + parameter.key()));
  }
  const auto state = mixer->make_state(x.size(0));
  std::vector<at::Tensor> parts;
  std::int64_t from = 0;
  for (const std::int64_t length : params.value("split", std::vector<std::int64_t>{x.size(1)})) {
    parts.push_back(mixer->forward(x.narrow(1, from, length), {}, state.get()));
    from += length;
  }
  const at::Tensor y = at::cat(parts, 1), S = state->tensors().at("S");
  const double allowed = std::stod(file->metadata().at("rtol"));
  EXPECT_LE(relative_error(y, tensor("out.y")), allowed);
  EXPECT_LE(relative_error(S, tensor("state_out.S")), allowed);
  if (!file->tensors().contains("grad_out.y")) return;
  std::vector<at::Tensor> sources = {x};
  std::vector<std::string> names = {"grad.x"};
  for (const auto& parameter : mixer->named_parameters()) {
    sources.push_back(parameter.value());
    names.push_back("grad.w." + parameter.key());
  }
  const auto grads =
      torch::autograd::grad({y, S}, sources, {tensor("grad_out.y"), tensor("grad_out.S")});
  for (std::size_t i = 0; i < names.size(); ++i)
    EXPECT_LE(relative_error(grads[i], tensor(names[i])), allowed) << names[i];
}

INSTANTIATE_TEST_SUITE_P(Tnl, GoldenLayer,
                         testing::Values("tnl_token_mixer__h4_b2_t21.safetensors",
                                         "tnl_token_mixer__lrpe_h2_cached_37_5.safetensors",
                                         "tnl_token_mixer__lrpe_h3_t19_layer0.safetensors"));
INSTANTIATE_TEST_SUITE_P(
    Minimax, GoldenLayer,
    testing::Values("minimax_lightning_layer__h4_t42.safetensors",
                    "minimax_lightning_layer__h4_t42_cached_37_5.safetensors",
                    "minimax_lightning_layer__h3_t16_layer0.safetensors",
                    "minimax_lightning_layer__h2_b2_t7_last_layer.safetensors"));

// The norm of MiniMax-01's layer adds 1e-6 whatever the model's norms add.
TEST(LightningLayer, MinimaxNormHasAnEpsilonOfItsOwn) {
  LayerSpec spec = spec_of(32, {{"form", "minimax"}, {"num_heads", 2}});
  spec.norm_eps = 1e-2;
  EXPECT_EQ(LayerSettings::read(spec)->norm_eps, 1e-6);
  spec.settings["form"] = "transnormer";
  EXPECT_EQ(LayerSettings::read(spec)->norm_eps, 1e-2);
}

// LRPE makes products depend on distances only: a stream that starts late sees what one at 0 sees.
// Trap: positions in fp32 stop moving at 2^24.
TEST(LightningLayer, RotationIsExactFarIntoAStream) {
  at::manual_seed(2);
  const at::NoGradGuard no_grad;
  const auto mixer = make(spec_of(32, {{"num_heads", 2}, {"lrpe", "all"}}));
  const at::Tensor x = at::randn({2, 40, 32});
  const at::Tensor expected = mixer->forward(x, {}, nullptr);
  const auto state = mixer->make_state(2);
  state->positions() = {std::int64_t{1} << 24, (std::int64_t{1} << 30) + 7};
  EXPECT_LE(relative_error(mixer->forward(x, {}, state.get()), expected), 1e-5);
  EXPECT_EQ(state->positions()[1], (std::int64_t{1} << 30) + 47);
}

TEST(LightningLayer, PackedSequencesHavePositionsOfTheirOwn) {
  at::manual_seed(3);
  const at::NoGradGuard no_grad;
  const auto mixer = make(spec_of(32, {{"num_heads", 2}, {"lrpe", "all"}}));
  mixer->to(at::kDouble);
  const at::Tensor x = at::randn({1, 30, 32}, at::kDouble);
  const auto together = mixer->make_state(3);
  const at::Tensor first = mixer->forward(x, {{0, 4, 4, 30}}, together.get());
  const at::Tensor second = mixer->forward(x, {{0, 1, 21, 30}}, together.get());
  const auto alone = mixer->make_state(1);
  const std::vector<std::int64_t> last = {2};
  const at::Tensor a = mixer->forward(x.narrow(1, 4, 26), {}, alone.get());
  const at::Tensor b = mixer->forward(x.narrow(1, 21, 9), {}, alone.get());
  EXPECT_LE(relative_error(first.narrow(1, 4, 26), a), tolerance::kFormsFloat64);
  EXPECT_LE(relative_error(second.narrow(1, 21, 9), b), tolerance::kFormsFloat64);
  EXPECT_LE(relative_error(together->select(last)->tensors().at("S"), alone->tensors().at("S")),
            tolerance::kFormsFloat64);
}

TEST(LightningLayer, StateIsFloat32UnderLowPrecisionWeights) {
  at::manual_seed(4);
  const at::NoGradGuard no_grad;
  const auto mixer = make(spec_of(32, {{"num_heads", 2}, {"head_dim", 24}, {"lrpe", "all"}}));
  mixer->to(at::kBFloat16);
  const auto state = mixer->make_state(1);
  EXPECT_EQ(state->tensors().at("S").scalar_type(), at::kFloat) << "before the first token";
  const at::Tensor y = mixer->forward(at::randn({1, 70, 32}).to(at::kBFloat16), {}, state.get());
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state->tensors().at("S").scalar_type(), at::kFloat);
  EXPECT_EQ(state->tensors().at("S").sizes(), (std::vector<std::int64_t>{1, 2, 48, 24}));
  EXPECT_EQ(state->bytes(), state->bytes_bound(70));
}

TEST(LightningLayer, SaysWhichPathRunsIt) {
  for (const char* form : {"transnormer", "minimax"}) {
    const auto mixer = make(spec_of(32, {{"form", form}, {"num_heads", 2}}));
    EXPECT_EQ(mixer->path(at::kCPU), "cpu kernel") << form;
    mixer->to(at::kDouble);
    EXPECT_EQ(mixer->path(at::kCPU), "composite (ATen)") << form;
  }
}

TEST(LightningLayer, LrpeInTheLayersThatTheSettingNames) {
  const auto count = [](std::int64_t layer, const nlohmann::json& lrpe) {
    return make(spec_of(32, {{"num_heads", 2}, {"lrpe", lrpe}}, layer))->named_parameters().size();
  };
  EXPECT_EQ(count(2, {0, 0, 1, 0}), 3U);
  EXPECT_EQ(count(3, {0, 0, 1, 0}), 2U);
  EXPECT_EQ(count(0, "first_layer"), 3U);
  EXPECT_EQ(count(1, "first_layer"), 2U);
  EXPECT_EQ(count(1, "all"), 3U);
  EXPECT_EQ(count(0, "none"), 2U);
}

TEST(LightningLayer, RefusesBadSettings) {
  const auto refused = [](std::int64_t hidden, const nlohmann::json& settings,
                          const std::string& expected) {
    const auto made = make_layer(spec_of(hidden, settings));
    ASSERT_FALSE(made.ok()) << expected;
    EXPECT_NE(made.status().message().find(expected), std::string::npos) << made.status().message();
  };
  refused(30, {{"num_heads", 4}}, "not a multiple");
  refused(32, {{"num_heads", 0}}, "num_heads");
  refused(32, {{"slope_rule", "alibi_layr"}}, "Did you mean \"alibi_layer\"");
  refused(32, {{"lrpe", "last"}}, "lrpe");
  refused(32, {{"lrpe", {1, 0}}}, "a list of 2 for 4 layers");
  refused(32, {{"lrpe", {1, 0, 2, 0}}}, "lrpe");
  refused(32, {{"form", "minimax"}, {"lrpe", "all"}}, "lrpe belongs to form");
  refused(32, {{"form", "mini"}}, "form");
  refused(32, {{"activation", "gelu"}}, "activation");
  refused(32, {{"write_behind", "maybe"}},
          "lightning: write_behind = \"maybe\" is not known; allowed: auto, on, off");
  refused(32, {{"write_behind", "onn"}}, "Did you mean \"on\"");
  refused(32, {{"write_behind", true}}, "write_behind");
  refused(32, {{"heads", 4}}, "heads is not a setting");
  refused(0, {}, "hidden_size");
  EXPECT_TRUE(make_layer(spec_of(30, {{"num_heads", 4}, {"head_dim", 8}})).ok());
}

// States are written behind on GPUs alone.
TEST(LightningLayer, WriteBehindIsReadAndChangesNothingOnTheCpu) {
  EXPECT_EQ(LayerSettings::read(spec_of(32, {}))->write_behind, WriteBehind::kAuto);
  EXPECT_EQ(LayerSettings::read(spec_of(32, {{"write_behind", "off"}}))->write_behind,
            WriteBehind::kOff);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> results;
  for (const char* form : {"transnormer", "minimax"})
    for (const char* write_behind : {"off", "on", "auto"}) {
      at::manual_seed(5);
      const auto mixer =
          make(spec_of(32, {{"form", form}, {"num_heads", 2}, {"write_behind", write_behind}}));
      const at::Tensor x = at::randn({2, 57, 32});
      const auto state = mixer->make_state(2);
      std::vector<at::Tensor> y = {mixer->forward(x.narrow(1, 0, 37), {}, state.get())};
      for (std::int64_t t = 37; t < 57; ++t)
        y.push_back(mixer->forward(x.narrow(1, t, 1), {}, state.get()));
      EXPECT_EQ(state->bytes(), state->bytes_bound(57)) << write_behind;
      EXPECT_EQ(state->positions(), (std::vector<std::int64_t>{57, 57}));
      y.push_back(state->tensors().at("S").flatten(2).view({2, -1, 32}));
      const at::Tensor all = at::cat(y, 1);
      if (write_behind == std::string("off")) results.push_back(all);
      EXPECT_TRUE(test::same_bits(all, results.back())) << form << " " << write_behind;
    }
}

TEST(LightningLayer, RefusesAStrangersState) {
  const auto mixer = make(spec_of(32, {{"num_heads", 2}}));
  const auto state = mixer->make_state(3);
  EXPECT_THROW(mixer->forward(at::zeros({2, 4, 32}), {}, state.get()), c10::ValueError);
}

}  // namespace
}  // namespace everlong::lightning
