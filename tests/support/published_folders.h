// Published model folders with random weights, for the tests that read them.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/published.h"
#include "support/small_models.h"

namespace everlong::test {

// One config of each family that transformers knows, and TransNormerLLM's.
inline std::vector<nlohmann::json> published_configs() {
  const nlohmann::json llama = {{"model_type", "llama"},
                                {"vocab_size", 19},
                                {"hidden_size", 16},
                                {"intermediate_size", 24},
                                {"num_hidden_layers", 2},
                                {"num_attention_heads", 4},
                                {"num_key_value_heads", 2},
                                {"rms_norm_eps", 1e-5},
                                {"tie_word_embeddings", false},
                                {"eos_token_id", {2, 7}},
                                {"max_position_embeddings", 77}};
  nlohmann::json minimax = llama;
  minimax.update({{"model_type", "minimax"},
                  {"head_dim", 8},
                  {"num_local_experts", 3},
                  {"num_experts_per_tok", 2},
                  {"layer_types", {"linear_attention", "full_attention"}},
                  {"linear_attn_alpha_factor", 1.7},
                  {"mlp_beta_factor", 1.2}});
  const nlohmann::json transnormer = {{"model_type", "transnormer"},
                                      {"vocab_size", 19},
                                      {"decoder_embed_dim", 16},
                                      {"decoder_layers", 2},
                                      {"decoder_attention_heads", 2},
                                      {"hidden_dim", 16},
                                      {"glu_dim", 24},
                                      {"linear_use_lrpe_list", {1, 0}},
                                      {"linear_act_fun", "silu"},
                                      {"no_scale_embedding", false}};
  return {llama, minimax, transnormer};
}

inline ModelConfig config_of(const nlohmann::json& published) {
  auto config = config_from_published(published, "test");
  EXPECT_TRUE(config.ok()) << config.status().message();
  config->initializer_range = 0.5;
  return *std::move(config);
}

// A published folder with random weights; returns the model that is in it.
inline std::shared_ptr<Decoder> publish(const fs::path& folder, const nlohmann::json& config,
                                        at::ScalarType dtype = at::kFloat) {
  auto model = small_model(config_of(config), dtype);
  EXPECT_TRUE(save_model(folder, *model, {}).ok());
  EXPECT_TRUE(write_file(folder / "config.json", config.dump()).ok());
  fs::remove(folder / "generation_config.json");
  return model;
}

// A folder to write into, in a folder of the test.
inline fs::path made(const TemporaryFolder& folder, const std::string& name) {
  fs::create_directories(folder / name);
  return folder / name;
}

}  // namespace everlong::test
