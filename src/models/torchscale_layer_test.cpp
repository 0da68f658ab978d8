#include "models/torchscale_layer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "support/compare.h"

namespace everlong {
namespace {

ModelConfig config_of(const std::string& block) {
  ModelConfig config;
  config.block = block;
  config.vocab_size = 50, config.hidden_size = 32, config.intermediate_size = 64;
  config.layer_types = {"longnet", "longnet"};
  config.norm_eps = 1e-5;
  config.mechanisms["longnet"] = {
      {"num_heads", 4}, {"segment_length", {8, 16, 32}}, {"dilated_ratio", {1, 2, 4}}};
  return config;
}

TEST(TorchscaleLayer, ModelHasThePublishedNames) {
  const auto model = Decoder::make(config_of("torchscale"));
  ASSERT_TRUE(model.ok()) << model.status().message();
  std::set<std::string> want = {"embed_tokens.weight", "layer_norm.weight", "layer_norm.bias",
                                "output_projection.weight"};
  for (int i = 0; i < 2; ++i)
    for (const char* part :
         {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
          "self_attn.inner_attn_ln", "self_attn_layer_norm", "ffn.fc1", "ffn.fc2",
          "ffn.ffn_layernorm", "final_layer_norm"})
      for (const char* kind : {"weight", "bias"})
        want.insert(cat("layers.", i, ".", part, ".", kind));
  std::set<std::string> names;
  for (const auto& item : (*model)->named_parameters()) names.insert(item.key());
  EXPECT_EQ(names, want);
}

TEST(TorchscaleLayer, ModelsOfEitherBlockStreamAsTheyRun) {
  const at::NoGradGuard off;
  for (const char* block : {"torchscale", "llama"}) {
    at::manual_seed(2);
    const auto made = Decoder::make(config_of(block));
    ASSERT_TRUE(made.ok()) << made.status().message();
    const auto& model = *made;
    model->to(at::kDouble);
    const at::Tensor tokens = at::randint(0, 50, {2, 75}, at::kLong);
    const at::Tensor whole = model->logits(model->hidden(tokens, {}, nullptr));
    ModelState state = model->make_state(2);
    std::vector<at::Tensor> parts;
    for (std::int64_t t = 0; t < 75;) {
      const std::int64_t count = t < 20 ? 20 : t == 40 ? 30 : 1;
      parts.push_back(model->logits(model->hidden(tokens.narrow(1, t, count), {}, &state)));
      t += count;
    }
    EXPECT_LT(test::relative_error(at::cat(parts, 1), whole), 1e-11) << block;
  }
}

TEST(TorchscaleLayer, ConfigTravelsAndMixesAreRefused) {
  const ModelConfig config = config_of("torchscale");
  const auto again = ModelConfig::from_json(config.to_json(), "config.json");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->block, "torchscale");
  ModelConfig mixed = config;
  mixed.layer_types[1] = "softmax";
  EXPECT_NE(Decoder::make(mixed).status().message().find("layer_types[1]"), std::string::npos);
  ModelConfig plain = config;
  plain.mechanisms["longnet"]["form"] = "llama";
  EXPECT_NE(Decoder::make(plain).status().message().find("form"), std::string::npos);
}

// Post-norm and without sub-LN, by the formula.
TEST(TorchscaleLayer, NormsStandWhereTheSettingsSay) {
  const at::NoGradGuard off;
  for (const bool before : {true, false})
    for (const bool subln : {true, false}) {
      TorchscaleSettings s;
      s.attention = *longnet::read_settings({.hidden_size = 16,
                                             .settings = {{"form", "torchscale"},
                                                          {"num_heads", 2},
                                                          {"subln", subln},
                                                          {"segment_length", {8}},
                                                          {"dilated_ratio", {1}}}});
      s.ffn_dim = 24;
      s.normalize_before = before;
      at::manual_seed(4);
      TorchscaleLayer layer(s);
      layer.to(at::kDouble);
      for (auto& item : layer.named_parameters())  // norms that do something
        if (item.value().dim() == 1) item.value().normal_(1, 0.2);
      const auto parameters = layer.named_parameters();
      const auto p = [&](const std::string& name) { return parameters[name]; };
      const auto norm = [&](const at::Tensor& x, const std::string& name) {
        return at::layer_norm(x, {x.size(2)}, p(name + ".weight"), p(name + ".bias"), 1e-5);
      };
      const auto linear = [&](const at::Tensor& x, const std::string& name) {
        return at::linear(x, p(name + ".weight"), p(name + ".bias"));
      };
      const at::Tensor x = at::randn({1, 8, 16}, at::kDouble);
      const auto attend = [&](const at::Tensor& in) {
        const auto heads = [&](const char* name) {
          return linear(in, cat("self_attn.", name, "_proj")).view({1, 8, 2, 8}).transpose(1, 2);
        };
        const at::Tensor scores = (at::matmul(heads("q"), heads("k").mT()) / std::sqrt(8.0))
                                      .masked_fill(at::ones({8, 8}, at::kBool).triu(1), -INFINITY);
        at::Tensor o =
            at::matmul(at::softmax(scores, -1), heads("v")).transpose(1, 2).reshape({1, 8, 16});
        if (subln) o = norm(o, "self_attn.inner_attn_ln");
        return linear(o, "self_attn.out_proj");
      };
      const auto mix = [&](const at::Tensor& in) {
        at::Tensor h = at::gelu(linear(in, "ffn.fc1"));
        if (subln) h = norm(h, "ffn.ffn_layernorm");
        return linear(h, "ffn.fc2");
      };
      at::Tensor y;
      if (before) {
        y = x + attend(norm(x, "self_attn_layer_norm"));
        y = y + mix(norm(y, "final_layer_norm"));
      } else {
        y = norm(x + attend(x), "self_attn_layer_norm");
        y = norm(y + mix(y), "final_layer_norm");
      }
      EXPECT_LT(test::relative_error(layer.forward(x, {}, nullptr), y), 1e-12);
    }
}

}  // namespace
}  // namespace everlong
