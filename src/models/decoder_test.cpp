#include "models/decoder.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>

#include "support/small_models.h"

namespace everlong {
namespace {

using test::describe;
using test::relative_error;
using test::small_config;
using test::small_configs;
using test::small_model;

constexpr double kSplit = tolerance::split_of(DType::kFloat64);

at::Tensor random_tokens(std::int64_t batch, std::int64_t count, const ModelConfig& config) {
  return at::randint(0, config.vocab_size, {batch, count}, at::kLong);
}

// Parameter names outside the mixers.
std::set<std::string> names_around_mixers(const Decoder& model, const std::string& mixer) {
  std::set<std::string> names;
  for (const auto& item : model.named_parameters())
    if (item.key().find(cat(".", mixer, ".")) == std::string::npos) names.insert(item.key());
  return names;
}

TEST(Decoder, ParametersHaveThePublishedNames) {
  const std::string some = mechanisms().front()->name;
  const auto transnormer = small_model(small_config("transnormer", {some}));
  EXPECT_EQ(
      names_around_mixers(*transnormer, "token_mixer"),
      (std::set<std::string>{"model.embed_tokens.weight", "model.layers.0.channel_mixer.l1.weight",
                             "model.layers.0.channel_mixer.l2.weight",
                             "model.layers.0.channel_mixer.l3.weight", "lm_head.weight"}));
  const auto llama = small_model(small_config("llama", {some}));
  EXPECT_EQ(names_around_mixers(*llama, "self_attn"),
            (std::set<std::string>{
                "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                "model.layers.0.post_attention_layernorm.weight",
                "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
                "model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"}));
}

TEST(Decoder, BlocksAddMixerAndMlpBehindTheirNorms) {
  for (const char* kind : {"transnormer", "llama"}) {
    const auto config = small_config(kind, {mechanisms().front()->name});
    const auto model = small_model(config);
    auto parameters = model->named_parameters();
    const bool llama = config.block == "llama";
    at::NoGradGuard off;
    for (const auto& item : parameters)  // weights of norms that are not all one
      if (item.key().find("norm") != std::string::npos) item.value().uniform_(0.5, 1.5);
    const auto norm = [&](const at::Tensor& x, const std::string& name) {
      const at::Tensor y = x * (x.square().mean(-1, true) + config.norm_eps).rsqrt();
      return llama ? y * parameters["model." + name + ".weight"] : y;
    };
    const auto project = [&](const at::Tensor& x, const std::string& name) {
      return at::linear(x, parameters["model.layers.0." + name + ".weight"]);
    };
    const at::Tensor tokens = random_tokens(2, 9, config);
    at::Tensor x = parameters["model.embed_tokens.weight"].index({tokens});
    x = x + model->mixer(0).forward(norm(x, "layers.0.input_layernorm"), {}, nullptr);
    const at::Tensor y = norm(x, "layers.0.post_attention_layernorm");
    x = x + (llama ? project(at::silu(project(y, "mlp.gate_proj")) * project(y, "mlp.up_proj"),
                             "mlp.down_proj")
                   : project(project(y, "channel_mixer.l1") * project(y, "channel_mixer.l2"),
                             "channel_mixer.l3"));
    const at::Tensor expected = norm(x, "norm");
    const at::Tensor hidden = model->hidden(tokens, {}, nullptr);
    EXPECT_LT(relative_error(hidden, expected), kSplit) << kind;
    EXPECT_LT(
        relative_error(model->logits(hidden), at::linear(expected, parameters["lm_head.weight"])),
        kSplit);
  }
}

struct Gradients {
  at::Tensor hidden;
  std::vector<at::Tensor> gradients;  // of <hidden, direction>, in the parameters
  TensorMap state;
};

// Feeds tokens in pieces of the given lengths with a carried state, and differentiates through all
// of it.
Gradients differentiate(Decoder& model, const at::Tensor& tokens_BT,
                        const std::vector<std::int64_t>& pieces, const at::Tensor& direction,
                        bool carry = true) {
  ModelState state = model.make_state(tokens_BT.size(0));
  std::vector<at::Tensor> parts;
  std::int64_t begin = 0;
  for (const std::int64_t length : pieces) {
    parts.push_back(model.hidden(tokens_BT.narrow(1, begin, length), {}, carry ? &state : nullptr));
    begin += length;
  }
  const at::Tensor hidden = at::cat(parts, 1);
  at::Tensor objective = (hidden * direction).sum();
  // What is carried out counts too, so that gradients into the final state are seen.
  if (carry)
    for (const auto& [name, tensor] : state.tensors())
      if (tensor.requires_grad()) objective = objective + tensor.square().mean();
  Gradients result{hidden.detach(), {}, {}};
  result.gradients =
      torch::autograd::grad({objective}, model.parameters(), {}, {}, false, /*allow_unused=*/true);
  for (const auto& [name, tensor] : state.tensors()) result.state[name] = tensor.detach();
  return result;
}

void expect_same(const Gradients& a, const Gradients& b, const Decoder& model,
                 const std::string& what) {
  EXPECT_LT(relative_error(a.hidden, b.hidden), kSplit) << what;
  ASSERT_EQ(a.state.size(), b.state.size()) << what;
  for (const auto& [name, tensor] : b.state)
    EXPECT_LT(relative_error(a.state.at(name), tensor), kSplit) << what << ": " << name;
  const auto names = model.named_parameters().keys();
  for (std::size_t i = 0; i < names.size(); ++i) {
    ASSERT_EQ(a.gradients[i].defined(), b.gradients[i].defined()) << what << ": " << names[i];
    if (!b.gradients[i].defined()) continue;
    EXPECT_LT(relative_error(a.gradients[i], b.gradients[i]), tolerance::kLayerGradientFloat64)
        << what << ": " << names[i];
  }
}

TEST(Decoder, PiecesEqualOnePassInOutputsStateAndGradients) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config);
    const at::Tensor tokens = random_tokens(2, 23, config);
    const at::Tensor direction = at::randn({2, 23, config.hidden_size}, at::kDouble);
    const auto whole = differentiate(*model, tokens, {23}, direction);
    for (const auto& pieces :
         std::vector<std::vector<std::int64_t>>{{1, 22}, {7, 0, 9, 7}, {22, 1}})
      expect_same(differentiate(*model, tokens, pieces, direction), whole, *model,
                  describe(config));
  }
}

TEST(Decoder, CheckpointingChangesNoGradient) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config);
    const at::Tensor tokens = random_tokens(2, 23, config);
    const at::Tensor direction = at::randn({2, 23, config.hidden_size}, at::kDouble);
    for (const bool carry : {false, true}) {
      model->set_checkpointing(false);
      const auto plain = differentiate(*model, tokens, {9, 14}, direction, carry);
      model->set_checkpointing(true);
      const auto again = differentiate(*model, tokens, {9, 14}, direction, carry);
      expect_same(again, plain, *model, cat(describe(config), carry ? ", state carried" : ""));
    }
  }
}

TEST(Decoder, PackedSequencesEqualSeparateOnes) {
  for (const auto& config : small_configs()) {
    const auto lacks = [](const std::string& name) {
      return !(*find_mechanism(name))->has("varlen");
    };
    if (std::ranges::any_of(config.layer_types, lacks)) continue;
    const auto model = small_model(config);
    at::NoGradGuard off;
    const at::Tensor tokens = random_tokens(1, 20, config);
    const Sequences packed{{0, 7, 7, 8, 20}};
    const at::Tensor together = model->hidden(tokens, packed, nullptr);
    for (std::size_t n = 0; n + 1 < packed.offsets.size(); ++n) {
      const std::int64_t begin = packed.offsets[n], length = packed.offsets[n + 1] - begin;
      const at::Tensor alone = model->hidden(tokens.narrow(1, begin, length), {}, nullptr);
      EXPECT_LT(relative_error(together.narrow(1, begin, length), alone), kSplit)
          << describe(config);
    }
  }
}

// Three sequences that each get another number of tokens in every call, none included.
TEST(Decoder, RaggedFeedsContinueEachSequence) {
  const std::vector<std::vector<std::int64_t>> feeds = {{4, 0, 5}, {7, 6, 1}, {0, 1, 1}, {1, 2, 9}};
  for (const auto& config : small_configs()) {
    const auto lacks = [](const std::string& name) {
      return !(*find_mechanism(name))->has("varlen");
    };
    if (std::ranges::any_of(config.layer_types, lacks)) continue;
    const auto model = small_model(config);
    at::NoGradGuard off;
    const at::Tensor tokens = random_tokens(3, 16, config);
    ModelState state = model->make_state(3);
    std::vector<std::vector<at::Tensor>> parts(3);
    std::vector<std::int64_t> fed(3, 0);
    for (const auto& lengths : feeds) {
      Sequences packed{{0}};
      std::vector<at::Tensor> line;
      for (std::size_t n = 0; n < 3; ++n) {
        line.push_back(tokens[static_cast<std::int64_t>(n)].narrow(0, fed[n], lengths[n]));
        packed.offsets.push_back(packed.offsets.back() + lengths[n]);
        fed[n] += lengths[n];
      }
      const at::Tensor out = model->hidden(at::cat(line).unsqueeze(0), packed, &state);
      for (std::size_t n = 0; n < 3; ++n)
        parts[n].push_back(out.narrow(1, packed.offsets[n], lengths[n]));
    }
    for (std::size_t n = 0; n < 3; ++n) {
      const at::Tensor alone = model->hidden(
          tokens.narrow(0, static_cast<std::int64_t>(n), 1).narrow(1, 0, fed[n]), {}, nullptr);
      EXPECT_LT(relative_error(at::cat(parts[n], 1), alone), kSplit)
          << describe(config) << ", " << n;
    }
  }
}

TEST(Decoder, TiedHeadIsTheEmbedding) {
  auto config = small_config("llama", {mechanisms().front()->name});
  config.tie_word_embeddings = true;
  const auto model = small_model(config);
  EXPECT_FALSE(model->named_parameters().contains("lm_head.weight"));
  EXPECT_TRUE(model->head_weight().is_same(model->named_parameters()["model.embed_tokens.weight"]));
}

TEST(Decoder, ScaledEmbeddingIsTimesTheRootOfTheWidth) {
  auto config = small_config("llama", {mechanisms().front()->name});
  const auto plain = small_model(config);
  config.scale_embedding = true;
  const auto scaled = small_model(config);
  at::NoGradGuard off;
  scaled->named_parameters()["model.embed_tokens.weight"].div_(4);  // sqrt(16)
  const at::Tensor tokens = random_tokens(1, 5, config);
  EXPECT_LT(relative_error(scaled->hidden(tokens, {}, nullptr), plain->hidden(tokens, {}, nullptr)),
            kSplit);
}

TEST(Decoder, InitialisationFollowsTheConfig) {
  auto config = small_config("llama", {mechanisms().front()->name});
  config.vocab_size = 4000;
  config.initializer_range = 0.03;
  const auto model = small_model(config);
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
    const at::Tensor weight = model->named_parameters()[name];
    // 64,000 values: the deviation is known to 0.3 %; five times that.
    EXPECT_NEAR(weight.std().item<double>(), 0.03, 0.03 * 0.015) << name;
    EXPECT_NEAR(weight.mean().item<double>(), 0, 0.001) << name;
  }
}

TEST(Decoder, BadCallsAreRefusedWithAMessage) {
  const auto config = small_config("llama", {mechanisms().front()->name});
  const auto model = small_model(config);
  const at::Tensor tokens = random_tokens(2, 6, config);
  ModelState three = model->make_state(3);
  EXPECT_ANY_THROW(model->hidden(tokens.to(at::kInt), {}, nullptr));
  EXPECT_ANY_THROW(model->hidden(tokens[0], {}, nullptr));
  EXPECT_ANY_THROW(model->hidden(tokens, {}, &three));
  EXPECT_ANY_THROW(model->hidden(tokens, {{0, 6}}, nullptr));  // offsets need a batch of 1
  EXPECT_ANY_THROW(model->hidden(tokens.narrow(0, 0, 1), {{0, 5}}, nullptr));
  EXPECT_ANY_THROW(model->hidden(tokens.narrow(0, 0, 1), {{0, 4, 3, 6}}, nullptr));
  EXPECT_ANY_THROW(model->hidden(tokens.narrow(0, 0, 1), {{1, 6}}, nullptr));
}

TEST(Decoder, ExpertsThatDoNotFitAreRefused) {
  auto config = small_config("transnormer", {mechanisms().front()->name});
  config.num_experts = 4;
  EXPECT_NE(Decoder::make(config).status().message().find("block \"llama\""), std::string::npos);
  config.block = "llama";
  EXPECT_TRUE(Decoder::make(config).ok());
  config.experts_per_token = 5;
  EXPECT_NE(Decoder::make(config).status().message().find("5 of 4 experts"), std::string::npos);
}

// x = alpha r + beta f(h), h = norm(x), r = x or h.
TEST(Decoder, ResidualsAreWeighedAndMayStartFromTheNorm) {
  for (const bool after_norm : {false, true}) {
    auto config = small_config("llama", {mechanisms().front()->name});
    config.residual_after_norm = after_norm;
    config.residuals = {{mechanisms().front()->name, {1.7, 0.9}}, {"mlp", {1.6, -1.2}}};
    const auto model = small_model(config);
    auto parameters = model->named_parameters();
    at::NoGradGuard off;
    for (const auto& item : parameters)
      if (item.key().find("norm") != std::string::npos) item.value().uniform_(0.5, 1.5);
    const auto norm = [&](const at::Tensor& x, const std::string& name) {
      return x * (x.square().mean(-1, true) + config.norm_eps).rsqrt() *
             parameters["model." + name + ".weight"];
    };
    const auto project = [&](const at::Tensor& x, const std::string& name) {
      return at::linear(x, parameters["model.layers.0.mlp." + name + ".weight"]);
    };
    const at::Tensor tokens = random_tokens(2, 9, config);
    at::Tensor x = parameters["model.embed_tokens.weight"].index({tokens});
    at::Tensor h = norm(x, "layers.0.input_layernorm");
    x = 1.7 * (after_norm ? h : x) + 0.9 * model->mixer(0).forward(h, {}, nullptr);
    h = norm(x, "layers.0.post_attention_layernorm");
    x = 1.6 * (after_norm ? h : x) -
        1.2 * project(at::silu(project(h, "gate_proj")) * project(h, "up_proj"), "down_proj");
    EXPECT_LT(relative_error(model->hidden(tokens, {}, nullptr), norm(x, "norm")), kSplit);
  }
}

TEST(Decoder, SettingsThatALayerRefusesAreNamed) {
  auto config = small_config("llama", {mechanisms().front()->name});
  config.mechanisms.begin()->second["no_such_key"] = 1;
  const auto model = Decoder::make(config);
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("layer 0"), std::string::npos)
      << model.status().message();
  EXPECT_NE(model.status().message().find("no_such_key"), std::string::npos)
      << model.status().message();
}

TEST(ModelState, RestoreIsAllOrNothing) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config);
    at::NoGradGuard off;
    ModelState state = model->make_state(1), other = model->make_state(1);
    model->hidden(random_tokens(1, 5, config), {}, &state);
    model->hidden(random_tokens(1, 9, config), {}, &other);
    const TensorMap before = state.clone().tensors();

    TensorMap broken = other.tensors();
    const std::string last = broken.rbegin()->first;  // of the last layer: the first fits
    broken[last] = at::zeros({1, 1, 1, 1, 1, 1, 1});
    EXPECT_FALSE(state.restore(broken, {9}).ok());
    TensorMap missing = other.tensors();
    missing.erase(last);
    EXPECT_FALSE(state.restore(missing, {9}).ok());
    TensorMap extra = other.tensors();
    extra["layers.99.S"] = at::zeros({1});
    EXPECT_FALSE(state.restore(extra, {9}).ok());
    EXPECT_FALSE(state.restore(other.tensors(), {9, 9}).ok());
    EXPECT_FALSE(state.restore(other.tensors(), {-1}).ok());
    EXPECT_EQ(state.positions().front(), 5);
    for (const auto& [name, tensor] : state.tensors())
      EXPECT_TRUE(tensor.equal(before.at(name))) << name;

    ASSERT_TRUE(state.restore(other.tensors(), {9}).ok()) << describe(config);
    EXPECT_EQ(state.positions().front(), 9);
    for (const auto& [name, tensor] : state.tensors())
      EXPECT_TRUE(tensor.equal(other.tensors().at(name))) << name;
  }
}

TEST(ModelState, DetachCutsTheGradient) {
  const auto config = small_configs().back();
  const auto model = small_model(config);
  ModelState state = model->make_state(1);
  model->hidden(random_tokens(1, 5, config), {}, &state);
  const auto carries_gradient = [&] {
    for (const auto& [name, tensor] : state.tensors())
      if (tensor.requires_grad()) return true;
    return false;
  };
  EXPECT_TRUE(carries_gradient());
  state.detach();
  EXPECT_FALSE(carries_gradient());
  EXPECT_EQ(state.positions().front(), 5);
}

}  // namespace
}  // namespace everlong
