#include "models/published.h"

#include <gtest/gtest.h>

#include "models/presets.h"
#include "support/small_models.h"

namespace everlong {
namespace {

using nlohmann::json;

json llama() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "attention_bias": false, "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2,
    "head_dim": 8, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 56,
    "max_position_embeddings": 512, "mlp_bias": false, "num_attention_heads": 4,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "tie_word_embeddings": true, "use_cache": true, "vocab_size": 300})");
}

json transnormer() {
  return json::parse(R"({"architectures": ["TransnormerForCausalLM"], "model_type": "transnormer",
    "decoder_embed_dim": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "hidden_dim": 48,
    "glu_dim": 40, "linear_use_lrpe_list": [0, 1, 0], "linear_act_fun": "swish",
    "norm_type": "simplermsnorm", "no_scale_embedding": false, "bias": false, "vocab_size": 300})");
}

// The same model in both spellings, but for the slopes. The second has every key of the released
// MiniMax-M1's config.json.
json minimax() {
  return json::parse(R"({"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax",
    "block_size": 16, "full_attn_alpha_factor": 1.4, "full_attn_beta_factor": 1.1, "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 24,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_attn_alpha_factor": 1.7, "linear_attn_beta_factor": 0.9, "mlp_alpha_factor": 1.6,
    "mlp_beta_factor": 1.2, "num_attention_heads": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "router_aux_loss_coef": 0.001, "sliding_window": null, "vocab_size": 300})");
}
json minimax_text_01() {
  return json::parse(R"({"architectures": ["MiniMaxText01ForCausalLM"], "head_dim": 16,
    "model_type": "minimax_text_01", "layernorm_full_attention_alpha": 1.4,
    "layernorm_full_attention_beta": 1.1, "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 24, "attn_type_list": [0, 0, 1, 0],
    "layernorm_linear_attention_alpha": 1.7, "layernorm_linear_attention_beta": 0.9,
    "layernorm_mlp_alpha": 1.6, "layernorm_mlp_beta": 1.2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_key_value_heads": 2, "postnorm": true,
    "num_local_experts": 4, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "rotary_dim": 16,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x.Config"}, "bos_token_id": null,
    "eos_token_id": null, "initializer_range": 0.02, "max_position_embeddings": 10240000,
    "output_router_logits": false, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "sliding_window": null, "tie_word_embeddings": false, "transformers_version": "4.45.2",
    "use_cache": true,
    "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "vocab_size": 300})");
}

ModelConfig read(const json& object) {
  const auto config = config_from_published(object, "config.json");
  EXPECT_TRUE(config.ok()) << config.status().message();
  return config.ok() ? *config : ModelConfig{};
}

TEST(Published, LlamaInBothPlacesOfRopeTheta) {
  const ModelConfig config = read(llama());
  EXPECT_EQ(config.block, "llama");
  EXPECT_EQ(config.layer_types, std::vector<std::string>(3, "softmax"));
  EXPECT_EQ(config.mechanisms.at("softmax"),
            json({{"num_heads", 4}, {"num_kv_heads", 2}, {"head_dim", 8}, {"rope_theta", 5e5}}));
  EXPECT_EQ(config.norm_eps, 1e-5);
  EXPECT_EQ(config.intermediate_size, 56);
  EXPECT_TRUE(config.tie_word_embeddings);
  json older = llama();
  older.erase("rope_parameters");
  older["rope_theta"] = 5e5;
  older["rope_scaling"] = nullptr;
  EXPECT_EQ(read(older).to_json(), config.to_json());
  for (const char* absent : {"num_key_value_heads", "head_dim"}) older.erase(absent);
  EXPECT_EQ(read(older).mechanisms.at("softmax").at("num_kv_heads"), 4);  // before grouped heads
  EXPECT_EQ(read(older).mechanisms.at("softmax").at("head_dim"), 8);
}

TEST(Published, TransnormerWithLrpeInTheLayersOfTheList) {
  const ModelConfig config = read(transnormer());
  EXPECT_EQ(config.block, "transnormer");
  EXPECT_TRUE(config.scale_embedding);
  EXPECT_EQ(config.intermediate_size, 40);
  EXPECT_EQ(config.mechanisms.at("lightning"), json({{"num_heads", 4},
                                                     {"head_dim", 12},
                                                     {"slope_rule", "alibi_layer"},
                                                     {"activation", "silu"},
                                                     {"lrpe", {0, 1, 0}}}));
  const auto model = Decoder::make(config, WeightInit::kMeta);
  ASSERT_TRUE(model.ok()) << model.status().message();
  const auto names = (*model)->named_parameters();
  EXPECT_FALSE(names.contains("model.layers.0.token_mixer.lrpe.theta"));
  EXPECT_TRUE(names.contains("model.layers.1.token_mixer.lrpe.theta"));
  const std::pair<json, json> lists[] = {
      {{1, 0, 0}, "first_layer"}, {{1, 1, 1}, "all"}, {{0, 0, 0}, "none"}, {json::array(), "none"}};
  for (const auto& [list, setting] : lists) {
    json object = transnormer();
    object["linear_use_lrpe_list"] = list;
    EXPECT_EQ(read(object).mechanisms.at("lightning").at("lrpe"), setting) << list.dump();
  }
}

TEST(Published, MinimaxInBothSpellings) {
  const ModelConfig config = read(minimax());
  EXPECT_EQ(config.layer_types,
            (std::vector<std::string>{"lightning", "lightning", "softmax", "lightning"}));
  EXPECT_EQ(config.residual("lightning"), (ModelConfig::Residual{1.7, 0.9}));
  EXPECT_EQ(config.residual("softmax"), (ModelConfig::Residual{1.4, 1.1}));
  EXPECT_EQ(config.residual("mlp"), (ModelConfig::Residual{1.6, 1.2}));
  EXPECT_TRUE(config.residual_after_norm);
  EXPECT_EQ(config.num_experts, 4);
  EXPECT_EQ(config.mechanisms.at("softmax").at("rope_theta"), 1e6);
  EXPECT_EQ(config.mechanisms.at("lightning").at("slope_rule"), "minimax_hf");
  ModelConfig hub = read(minimax_text_01());
  EXPECT_EQ(hub.mechanisms.at("lightning").at("slope_rule"), "alibi_layer");
  hub.mechanisms["lightning"]["slope_rule"] = "minimax_hf";
  EXPECT_EQ(hub.to_json(), config.to_json());

  json partial = minimax_text_01();
  partial["rotary_dim"] = 8;
  EXPECT_EQ(read(partial).mechanisms.at("softmax").at("rotary_dim"), 8);
  partial["postnorm"] = false;
  EXPECT_FALSE(read(partial).residual_after_norm);
  partial["model_type"] = "minimax_m1";
  EXPECT_TRUE(config_from_published(partial, "").ok());
}

TEST(Published, TheFamilyIsRecognisedByTypeOrClassOrKeys) {
  for (const json& object : {llama(), transnormer(), minimax(), minimax_text_01()}) {
    const std::string want = read(object).to_json().dump();
    EXPECT_TRUE(is_published(object));
    json without = object;
    without.erase("model_type");
    EXPECT_TRUE(is_published(without));
    EXPECT_EQ(read(without).to_json().dump(), want);
    without.erase("architectures");
    EXPECT_TRUE(is_published(without));
    EXPECT_EQ(read(without).to_json().dump(), want);
  }
  EXPECT_FALSE(is_published(test::small_minimax().to_json()));
  EXPECT_FALSE(is_published({{"layer_types", {"softmax"}}, {"hidden_size", 8}}));
  EXPECT_TRUE(is_published({{"model_type", "gpt2"}}));
}

TEST(Published, WhatWouldChangeTheNumbersIsRefusedByName) {
  struct Refusal {
    json object;
    std::string key;
    json value;
    std::string message;
  };
  const std::vector<Refusal> refusals = {
      {llama(), "attention_bias", true, "attention_bias = true"},
      {llama(), "mlp_bias", true, "mlp_bias = true"},
      {llama(), "hidden_act", "gelu", "hidden_act = \"gelu\""},
      {llama(), "sliding_window", 4096, "sliding_window = 4096"},
      {llama(), "rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}, "\"llama3\""},
      {llama(), "rope_parameters", {{"rope_type", "yarn"}}, "\"yarn\""},
      {llama(), "quantization_config", {{"bits", 4}}, "quantised"},
      {llama(), "qk_layernorm", true, "qk_layernorm is not a setting"},
      {llama(), "hidden_size", nullptr, "hidden_size is missing"},
      {llama(), "num_hidden_layers", -1, "num_hidden_layers = -1"},
      {llama(), "vocab_size", "many", "vocab_size"},
      {transnormer(), "bias", true, "bias = true"},
      {transnormer(), "norm_type", "layernorm", "norm_type"},
      {transnormer(), "gate_dim", 16, "gate_dim"},
      {transnormer(), "linear_act_fun", "relu", "linear_act_fun"},
      {transnormer(), "linear_use_lrpe_list", {1}, "linear_use_lrpe_list"},
      {transnormer(), "hidden_dim", 30, "hidden_dim 30 does not divide"},
      {minimax(), "layer_types", {"full_attention"}, "layer_types"},
      {minimax(), "layer_types", nullptr, "layer_types is missing"},
      {minimax(), "num_local_experts", nullptr, "num_local_experts is missing"},
      {minimax_text_01(), "shared_intermediate_size", {64}, "shared_intermediate_size = [64]"},
      {minimax_text_01(), "use_qk_norm", true, "use_qk_norm"},
      {minimax_text_01(), "attn_type_list", {0, 0, 2, 0}, "attn_type_list"},
      {llama(), "model_type", "gpt2", "model_type = \"gpt2\""},
      {llama(), "model_type", "bailing_moe_linear", "Ling"},
  };
  for (const Refusal& refusal : refusals) {
    json object = refusal.object;
    object[refusal.key] = refusal.value;
    const auto config = config_from_published(object, "config.json");
    ASSERT_FALSE(config.ok()) << refusal.key << " = " << refusal.value;
    const std::string message = config.status().message();
    EXPECT_NE(message.find(refusal.message), std::string::npos) << message;
    EXPECT_EQ(message.find("config.json: "), 0U) << message;
  }
  for (const json& object : {json(), json(7), json::array(), json::object()})
    EXPECT_FALSE(config_from_published(object, "config.json").ok()) << object.dump();
}

TEST(Published, WhatWeWriteIsReadAsTheSameModel) {
  std::vector<std::pair<std::string, ModelConfig>> models = {
      {"llama", read(llama())},
      {"transnormer", read(transnormer())},
      {"minimax", read(minimax())},
      {"minimax_text_01", read(minimax_text_01())}};
  for (const Preset& known : presets()) {
    const auto config = preset(known.name);
    ASSERT_TRUE(config.ok()) << config.status().message();
    models.emplace_back(family_of(*config).value(), *config);
  }
  for (const auto& [family, config] : models) {
    EXPECT_EQ(family_of(config).value(), family);
    const auto written = published_config(config, family);
    ASSERT_TRUE(written.ok()) << written.status().message();
    EXPECT_EQ(read(*written).to_json(), config.to_json()) << family;
  }
}

TEST(Published, WhatAFamilyCannotSayIsRefused) {
  struct Refusal {
    std::string family;
    json base;
    void (*change)(ModelConfig&);
    std::string message;
  };
  const std::vector<Refusal> refusals = {
      {"llama", llama(), [](ModelConfig& c) { c.mechanisms["softmax"]["window"] = 8; }, "window"},
      {"llama", llama(), [](ModelConfig& c) { c.mechanisms["softmax"]["rope"] = "none"; }, "rope"},
      {"llama", llama(), [](ModelConfig& c) { c.mechanisms["softmax"]["scale"] = 0.5; }, "scale"},
      {"llama", llama(), [](ModelConfig& c) { c.mechanisms["softmax"]["rotary_dim"] = 4; },
       "rotary_dim"},
      {"llama", llama(), [](ModelConfig& c) { c.scale_embedding = true; }, "scale_embedding"},
      {"llama", llama(),
       [](ModelConfig& c) {
         c.residuals["mlp"] = {2, 1};
       },
       "residuals"},
      {"llama", llama(), [](ModelConfig& c) { c.layer_types[1] = "lightning"; }, "lightning"},
      {"llama", minimax(), [](ModelConfig&) {}, "num_experts"},
      {"transnormer", llama(), [](ModelConfig&) {}, "block"},
      {"transnormer", transnormer(), [](ModelConfig& c) { c.norm_eps = 1e-5; }, "norm_eps"},
      {"transnormer", transnormer(),
       [](ModelConfig& c) { c.mechanisms["lightning"]["slope_rule"] = "paper"; }, "slope_rule"},
      {"transnormer", transnormer(),
       [](ModelConfig& c) {
         c.mechanisms["lightning"] = {{"form", "minimax"}};
       },
       "form"},
      {"minimax", minimax_text_01(), [](ModelConfig&) {}, "slope_rule"},
      {"minimax_text_01", minimax(), [](ModelConfig&) {}, "slope_rule"},
      {"minimax", minimax(), [](ModelConfig& c) { c.residual_after_norm = false; },
       "residual_after_norm"},
      {"minimax", minimax(), [](ModelConfig& c) { c.mechanisms["softmax"]["rotary_dim"] = 8; },
       "rotary_dim"},
      {"minimax", minimax(), [](ModelConfig& c) { c.mechanisms["lightning"]["num_heads"] = 2; },
       "heads"},
      {"minimax", minimax(), [](ModelConfig& c) { c.mechanisms["lightning"]["norm_eps"] = 1e-5; },
       "norm_eps"},
      {"minimax", llama(), [](ModelConfig&) {}, "experts"},
      {"mistral", llama(), [](ModelConfig&) {}, "\"mistral\" is not a published family"},
  };
  for (const Refusal& refusal : refusals) {
    ModelConfig config = read(refusal.base);
    refusal.change(config);
    const auto written = published_config(config, refusal.family);
    ASSERT_FALSE(written.ok()) << refusal.family << ": " << refusal.message;
    EXPECT_NE(written.status().message().find(refusal.message), std::string::npos)
        << written.status().message();
  }
  EXPECT_FALSE(family_of(test::small_config("transnormer", {"lightning", "softmax"})).ok());
}

// Every number of a packed file comes back as the parameter it belongs to.
TEST(Published, PackedExpertsAreTheSameWeights) {
  const ModelConfig config = read(minimax());
  const auto model = test::small_model(config, at::kFloat);
  const auto parameters = model->named_parameters();
  TensorMap packed;
  for (std::int64_t i = 0; i < config.num_layers(); ++i) {
    const std::string block = cat("model.layers.", i, ".");
    std::vector<at::Tensor> gate_up, down;
    for (std::int64_t e = 0; e < config.num_experts; ++e) {
      const std::string expert = cat(block, "block_sparse_moe.experts.", e, ".");
      gate_up.push_back(
          at::cat({parameters[expert + "w1.weight"], parameters[expert + "w3.weight"]}));
      down.push_back(parameters[expert + "w2.weight"]);
    }
    packed[block + "mlp.experts.gate_up_proj"] = at::stack(gate_up);
    packed[block + "mlp.experts.down_proj"] = at::stack(down);
    packed[block + "mlp.gate.weight"] = parameters[block + "block_sparse_moe.gate.weight"];
  }
  std::int64_t found = 0;
  for (const auto& item : parameters) {
    const auto places = published_places(config, item.key());
    ASSERT_EQ(places.front().tensor, item.key());
    EXPECT_TRUE(places.front().packed_shape.empty());
    const bool of_experts = item.key().find("block_sparse_moe") != std::string::npos;
    ASSERT_EQ(places.size(), of_experts ? 2U : 1U) << item.key();
    if (!of_experts) continue;
    const PublishedPlace& place = places.back();
    const at::Tensor& tensor = packed.at(place.tensor);
    at::Tensor part = tensor;
    if (!place.packed_shape.empty()) {
      ASSERT_EQ(tensor.sizes(), at::IntArrayRef(place.packed_shape));
      part = tensor[place.expert].narrow(0, place.row, item.value().size(0));
      EXPECT_TRUE(part.is_contiguous());
    }
    EXPECT_TRUE(part.equal(item.value())) << item.key();
    ++found;
  }
  EXPECT_EQ(found, 4 * (1 + 3 * 4));
}

TEST(Published, ATransnormerHeadMayBeTheEmbedding) {
  const auto places = published_places(read(transnormer()), "lm_head.weight");
  ASSERT_EQ(places.size(), 2U);
  EXPECT_EQ(places.back().tensor, "model.embed_tokens.weight");
  EXPECT_EQ(published_places(read(llama()), "lm_head.weight").size(), 1U);
}

TEST(Published, TablesThatFollowFromTheConfigAreNoParameters) {
  for (const char* name :
       {"model.layers.0.self_attn.slope_rate", "model.layers.0.self_attn.query_decay",
        "model.layers.0.self_attn.key_decay", "model.layers.0.self_attn.diagonal_decay",
        "model.layers.7.self_attn.rotary_emb.inv_freq", "model.slopes"})
    EXPECT_TRUE(is_derived_tensor(name)) << name;
  for (const char* name : {"lm_head.weight", "model.layers.0.self_attn.norm.weight",
                           "model.slopes.weight", "model.layers.0.token_mixer.lrpe.theta"})
    EXPECT_FALSE(is_derived_tensor(name)) << name;
}

// Shapes alone: 456 billion parameters take no memory.
TEST(Presets, HaveThePublishedParameterCounts) {
  const std::pair<std::string_view, std::int64_t> counts[] = {
      {"transnormer-385m", 384'926'720},    {"transnormer-1b", 1'020'266'496},
      {"transnormer-7b", 6'836'719'616},    {"llama-7b", 6'738'415'616},
      {"llama-3-8b", 8'030'261'248},        {"llama-2-70b", 68'976'648'192},
      {"minimax-text-01", 456'089'655'296}, {"mega-200m", 220'627'968},
      {"mega-1.3b", 1'342'832'640},         {"mega-1.3b-pg19", 1'327'628'288},
      {"mega-7.1b", 7'117'381'632},         {"mega-7.3b", 7'385'817'088},
  };
  EXPECT_EQ(std::size(counts), presets().size());
  for (const auto& [name, count] : counts) {
    const auto model = Decoder::make(preset(name).value(), WeightInit::kMeta);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ((*model)->parameter_count(), count) << name;
    for (const auto& parameter : (*model)->parameters()) ASSERT_TRUE(parameter.is_meta()) << name;
  }
}

TEST(Presets, MinimaxUsesThePublishedShareOfItsParametersAndState) {
  const ModelConfig config = preset("minimax-text-01").value();
  const auto model = Decoder::make(config, WeightInit::kMeta).value();
  std::int64_t active = 0;
  for (const auto& item : model->named_parameters()) {
    if (item.key().find(".layers.") == std::string::npos) continue;
    const bool of_experts = item.key().find(".experts.") != std::string::npos;
    active += of_experts ? item.value().numel() * config.experts_per_token / config.num_experts
                         : item.value().numel();
  }
  // Model card: 45.9B activated a token, which is the layers without embedding and head.
  EXPECT_NEAR(static_cast<double>(active), 45.9e9, 0.05e9);
  // 64 heads of 128 x 128 fp32 in 70 layers; the ten softmax layers are empty yet.
  const ModelState state = model->make_state(1);
  EXPECT_EQ(state.bytes(), 70 * (std::int64_t{64} * 128 * 128 * 4 + 8) + 10 * 8);
}

TEST(Presets, UnknownNamesAreRefusedWithAGuess) {
  const auto config = preset("lama-7b");
  ASSERT_FALSE(config.ok());
  EXPECT_NE(config.status().message().find("Did you mean \"llama-7b\"?"), std::string::npos)
      << config.status().message();
}

}  // namespace
}  // namespace everlong
