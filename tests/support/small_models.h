// Small models over the registry, for the tests of models and sessions.
#pragma once
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "mechanisms/mechanism.h"
#include "models/decoder.h"

namespace everlong::support {

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

// Every mechanism alone, and all of them mixed, in both blocks.
inline std::vector<ModelConfig> small_configs() {
  std::vector<ModelConfig> configs;
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

inline std::shared_ptr<Decoder> small_model(const ModelConfig& config, std::uint64_t seed = 1) {
  at::manual_seed(seed);
  auto model = Decoder::make(config);
  if (!model.ok()) {
    ADD_FAILURE() << model.status().message();
    return nullptr;
  }
  return *std::move(model);
}

inline std::string describe(const ModelConfig& config) {
  return cat(config.block, " of ", join(config.layer_types, ", "));
}

// Largest difference over the largest magnitude: what a change of the order of sums may cost.
inline double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return INFINITY;
  if (a.numel() == 0) return 0;
  const at::Tensor expected = b.to(at::kDouble);
  const double scale = std::max(expected.abs().max().item<double>(), 1e-12);
  return (a.to(at::kDouble) - expected).abs().max().item<double>() / scale;
}

// fp32 through a few layers, summed in another order: some hundred roundings of 6e-8.
constexpr double kFp32Layers = 5e-5;

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

}  // namespace everlong::support
