#include "models/config.h"

#include <gtest/gtest.h>

#include "support/small_models.h"

namespace everlong {
namespace {

using nlohmann::json;

json minimal() { return {{"layer_types", {"lightning", "softmax", "lightning"}}}; }

void expect_refused(const json& object, std::string_view part) {
  const auto config = ModelConfig::from_json(object, "config.json");
  ASSERT_FALSE(config.ok()) << object.dump();
  EXPECT_NE(config.status().message().find(part), std::string::npos) << config.status().message();
  EXPECT_EQ(config.status().message().find("config.json: "), 0U) << config.status().message();
}

json with(const std::string& key, const json& value) {
  json object = minimal();
  object[key] = value;
  return object;
}

TEST(ModelConfig, JsonRoundTripKeepsEveryField) {
  ModelConfig config;
  config.block = "llama";
  config.vocab_size = 1000;
  config.hidden_size = 64;
  config.intermediate_size = 172;
  config.layer_types = {"softmax", "lightning"};
  config.mechanisms = {{"softmax", {{"num_heads", 4}}}};
  config.num_experts = 6;
  config.experts_per_token = 3;
  config.residuals = {{"softmax", {1.5, 0.5}}, {"mlp", {2, 1}}};
  config.residual_after_norm = true;
  config.norm_eps = 1e-5;
  config.tie_word_embeddings = true;
  config.scale_embedding = true;
  config.initializer_range = 0.01;
  config.tokenizer = "other";
  const auto read = ModelConfig::from_json(config.to_json(), "config.json");
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->to_json(), config.to_json());
  EXPECT_EQ(read->layer_types, config.layer_types);
  EXPECT_EQ(read->mechanisms, config.mechanisms);
  EXPECT_EQ(read->block, "llama");
  EXPECT_EQ(read->vocab_size, 1000);
  EXPECT_EQ(read->hidden_size, 64);
  EXPECT_EQ(read->intermediate_size, 172);
  EXPECT_EQ(read->num_experts, 6);
  EXPECT_EQ(read->experts_per_token, 3);
  EXPECT_EQ(read->residuals, config.residuals);
  EXPECT_EQ(read->residual("softmax").beta, 0.5);
  EXPECT_EQ(read->residual("lightning").alpha, 1);
  EXPECT_TRUE(read->residual_after_norm);
  EXPECT_EQ(read->norm_eps, 1e-5);
  EXPECT_TRUE(read->tie_word_embeddings);
  EXPECT_TRUE(read->scale_embedding);
  EXPECT_EQ(read->initializer_range, 0.01);
  EXPECT_EQ(read->tokenizer, "other");
}

TEST(ModelConfig, AbsentKeysTakeTheirDefaults) {
  const auto config = ModelConfig::from_json(minimal(), "config.json");
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->num_layers(), 3);
  EXPECT_EQ(config->hidden_size, ModelConfig{}.hidden_size);
  EXPECT_TRUE(config->mechanisms.empty());
}

TEST(ModelConfig, KeysOfOtherProgramsAreAcceptedWhenTheyAgree) {
  EXPECT_TRUE(ModelConfig::from_json(with("model_type", "everlong"), "").ok());
  EXPECT_TRUE(ModelConfig::from_json(with("architectures", {"everlong"}), "").ok());
  EXPECT_TRUE(ModelConfig::from_json(with("torch_dtype", "bfloat16"), "").ok());
  EXPECT_TRUE(ModelConfig::from_json(with("num_hidden_layers", 3), "").ok());
  expect_refused(with("model_type", "llama"), "model_type = \"llama\"");
  expect_refused(with("architectures", {"LlamaForCausalLM"}), "architectures");
  expect_refused(with("torch_dtype", "int8"), "torch_dtype");
  expect_refused(with("num_hidden_layers", 4), "num_hidden_layers = 4 but layer_types names 3");
}

TEST(ModelConfig, UnknownNamesAreRefusedWithAGuess) {
  expect_refused(with("hidden_sise", 8), "Did you mean \"hidden_size\"?");
  expect_refused({{"layer_types", {"softmax", "lighting"}}},
                 "layer_types[1] = \"lighting\" is not a mechanism");
  expect_refused({{"layer_types", {"softmax", "lighting"}}}, "Did you mean \"lightning\"?");
  expect_refused(with("block", "lama"), "Did you mean \"llama\"?");
}

TEST(ModelConfig, LayerTypesMustBeAListOfNames) {
  expect_refused(json::object(), "layer_types is missing");
  expect_refused({{"layer_types", json::array()}}, "layer_types");
  expect_refused({{"layer_types", "softmax"}}, "layer_types");
  expect_refused({{"layer_types", {1}}}, "layer_types[0] = 1");
}

TEST(ModelConfig, SettingsOfAMechanismThatNoLayerUsesAreRefused) {
  json object = {{"layer_types", {"lightning"}}, {"softmax", json::object()}};
  expect_refused(object, "softmax holds settings of a mechanism that no layer uses");
  expect_refused(with("softmax", 7), "an object of settings is needed");
}

TEST(ModelConfig, ResidualsBelongToPartsOfTheModel) {
  expect_refused(with("residuals", {{"megalodon", {{"alpha", 2}}}}),
                 "residuals names \"megalodon\"");
  expect_refused(with("residuals", {{"mlp", {{"gamma", 2}}}}), "gamma");
  expect_refused(with("residuals", {{"mlp", {{"alpha", "two"}}}}), "alpha");
  expect_refused(with("residuals", 2), "residuals = 2");
  EXPECT_TRUE(ModelConfig::from_json(with("residuals", {{"softmax", {{"beta", 2}}}}), "").ok());
}

TEST(ModelConfig, ImpossibleSizesAreRefused) {
  expect_refused(with("num_experts", -1), "num_experts = -1");
  expect_refused(with("experts_per_token", 0), "experts_per_token = 0");
  expect_refused(with("vocab_size", 0), "vocab_size = 0");
  expect_refused(with("hidden_size", -4), "hidden_size = -4");
  expect_refused(with("intermediate_size", 1.5), "intermediate_size = 1.5");
  expect_refused(with("norm_eps", -1e-6), "norm_eps");
  expect_refused(with("tie_word_embeddings", 1), "tie_word_embeddings");
}

TEST(ModelConfig, ReadNamesTheFile) {
  const test::TemporaryFolder folder("config_test");
  ASSERT_TRUE(write_file(folder / "config.json", "{\"layer_types\": [").ok());
  const auto broken = ModelConfig::read(folder / "config.json");
  ASSERT_FALSE(broken.ok());
  EXPECT_NE(broken.status().message().find("config.json: is not a valid JSON object"),
            std::string::npos);
  ASSERT_TRUE(write_file(folder / "config.json", minimal().dump()).ok());
  EXPECT_TRUE(ModelConfig::read(folder / "config.json").ok());
  EXPECT_EQ(ModelConfig::read(folder / "absent.json").status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace everlong
