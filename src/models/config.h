// config.json of a model folder: which blocks, which mechanism in which layer.
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/files.h"
#include "core/status.h"

namespace everlong {

struct ModelConfig {
  std::string block = "transnormer";  // "transnormer" (SRMSNorm, SGLU) or "llama" (RMSNorm, SwiGLU)
  std::int64_t vocab_size = 259;
  std::int64_t hidden_size = 128;
  std::int64_t intermediate_size = 384;
  std::vector<std::string> layer_types;  // one mechanism name a layer, any mix
  std::map<std::string, nlohmann::json>
      mechanisms;  // settings by mechanism name; absent: that room's defaults
  double norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool scale_embedding = false;  // times sqrt(hidden_size), as TransNormerLLM
  double initializer_range = 0.02;
  std::string tokenizer = "bytes";

  std::int64_t num_layers() const { return static_cast<std::int64_t>(layer_types.size()); }

  // Unknown keys, unknown mechanisms and impossible sizes are refused with the key in the message.
  static Result<ModelConfig> from_json(const nlohmann::json& object, const std::string& place);
  static Result<ModelConfig> read(const fs::path& config_json);
  nlohmann::json to_json() const;
};

}  // namespace everlong
