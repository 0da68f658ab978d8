// Small models over the registry, for the tests of models and sessions.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "mechanisms/mechanism.h"
#include "models/decoder.h"
#include "support/compare.h"

namespace everlong::test {

inline ModelConfig small_config(const std::string& block,
                                const std::vector<std::string>& layer_types) {
  ModelConfig config;
  config.block = block;
  config.vocab_size = 19;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.layer_types = layer_types;
  config.initializer_range = 0.5;  // logits of order one: a wrong state shows
  for (const auto& name : layer_types)
    config.mechanisms[name] = (*find_mechanism(name))->example_settings(16);
  return config;
}

// MiniMax-01 in small: both kinds of layer, experts, weighed residuals from the normalised input.
inline ModelConfig small_minimax() {
  ModelConfig config = small_config("llama", {"lightning", "softmax"});
  config.mechanisms["lightning"] = {
      {"form", "minimax"}, {"num_heads", 2}, {"head_dim", 12}, {"slope_rule", "minimax_hf"}};
  config.mechanisms["softmax"] = {
      {"num_heads", 2}, {"num_kv_heads", 1}, {"head_dim", 12}, {"rotary_dim", 6}};
  config.num_experts = 5;
  config.residual_after_norm = true;
  config.residuals = {{"lightning", {1.7, 0.9}}, {"softmax", {1.4, 1.1}}, {"mlp", {1.6, 1.2}}};
  return config;
}

// Megalodon in small: its own block, whose last norm carries a state too.
inline ModelConfig small_megalodon() {
  ModelConfig config = small_config("megalodon", {"megalodon", "megalodon"});
  config.mechanisms["megalodon"]["chunk_size"] = 8;
  config.norm_eps = 1e-5;
  config.rescale_mlp = true;
  return config;
}

// Every mechanism alone, and all of them mixed, in both blocks; and a model with experts.
inline std::vector<ModelConfig> small_configs() {
  std::vector<ModelConfig> configs = {small_minimax(), small_megalodon()};
  for (const char* block : {"transnormer", "llama"}) {
    std::vector<std::string> all;
    for (const Mechanism* mechanism : mechanisms()) {
      configs.push_back(small_config(block, {mechanism->name, mechanism->name}));
      all.push_back(mechanism->name);
    }
    configs.push_back(small_config(block, all));
  }
  return configs;
}

// Weights in double by default: then a law holds to rounding far below any mistake.
inline std::shared_ptr<Decoder> small_model(const ModelConfig& config,
                                            at::ScalarType dtype = at::kDouble,
                                            std::uint64_t seed = 1) {
  at::set_num_threads(1);  // a second thread would only wait for work this small
  at::manual_seed(seed);
  auto model = Decoder::make(config);
  if (!model.ok()) {
    ADD_FAILURE() << model.status().message();
    return nullptr;
  }
  (*model)->to(dtype);
  return *std::move(model);
}

inline std::string describe(const ModelConfig& config) {
  return cat(config.block, " of ", join(config.layer_types, ", "));
}

// A folder of this process that goes with the object.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name)
      : path_(fs::temp_directory_path() / cat("everlong_", name, "_", ::getpid())) {
    fs::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace everlong::test
