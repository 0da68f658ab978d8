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

// What a config may ask for at most.
inline constexpr std::int64_t kMaxWidth = std::int64_t{1} << 20, kMaxLayers = 4096,
                              kMaxHeads = 65536;

struct ModelConfig {
  // "transnormer" (SRMSNorm, SGLU), "llama" (RMSNorm, SwiGLU), "gpt" (LayerNorm, GELU),
  // "megalodon" (norms over time, a residual that skips two hops; all layers of that mechanism) or
  // "torchscale" (LayerNorm and projections with biases, sub-LN; all layers longnet)
  std::string block = "transnormer";
  std::int64_t vocab_size = 259;
  std::int64_t hidden_size = 128;
  std::int64_t intermediate_size = 384;
  std::vector<std::string> layer_types;  // one mechanism name a layer, any mix
  std::map<std::string, nlohmann::json>
      mechanisms;  // settings by mechanism name; absent: that room's defaults
  double norm_eps = 1e-6;
  // The channel mixer of every layer: one MLP, or (block llama) this many of which a token uses
  // few.
  std::int64_t num_experts = 0;  // 0: one MLP
  std::int64_t experts_per_token = 2;
  // x = alpha r + beta f(norm(x)) for f a mixer (by mechanism name) or the channel mixer ("mlp");
  // absent: 1 and 1. r is x, or norm(x) itself where residual_after_norm (MiniMax-01).
  struct Residual {
    double alpha = 1, beta = 1;
    bool operator==(const Residual&) const = default;
  };
  std::map<std::string, Residual> residuals;
  bool residual_after_norm = false;
  // Of block megalodon: SwiGLU or a plain MLP, its output scaled by a learned vector or not, and a
  // head of another size than the vocabulary (0: the same).
  bool gated_mlp = true, rescale_mlp = false;
  std::int64_t output_size = 0;
  bool tie_word_embeddings = false;
  bool scale_embedding = false;  // times sqrt(hidden_size), as TransNormerLLM
  double initializer_range = 0.02;
  // The token that closes a block of text (Landmark Attention); -1: none. Whether the model was
  // trained to predict it: else the token after it stands in its place as a target.
  std::int64_t landmark_id = -1;
  bool landmark_predicted = false;
  std::string tokenizer = "bytes";

  Residual residual(const std::string& part) const {
    const auto found = residuals.find(part);
    return found == residuals.end() ? Residual{} : found->second;
  }
  std::int64_t num_layers() const { return static_cast<std::int64_t>(layer_types.size()); }

  // Unknown keys, unknown mechanisms and impossible sizes are refused with the key in the message.
  static Result<ModelConfig> from_json(const nlohmann::json& object, const std::string& place);
  static Result<ModelConfig> read(const fs::path& config_json);
  nlohmann::json to_json() const;
};

}  // namespace everlong
