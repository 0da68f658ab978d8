// Between published.cpp and its reader and writer.
#pragma once
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/status.h"

namespace everlong {

enum class Family {  // as published_families()
  kLlama,
  kTransnormer,
  kMinimax,
  kMinimaxText01,
  kLandmarkLlama,
  kLandmarkGpt,
  kMegalodon,
};

Result<Family> parse_family(std::string_view name);
// The family of a config.json; the message of a failure names what it says.
Result<Family> recognise(const nlohmann::json& config);

// The keys in which the two MiniMax families differ.
struct MinimaxKeys {
  const char *layers, *linear_alpha, *linear_beta, *full_alpha, *full_beta, *mlp_alpha, *mlp_beta;
  const char* slope_rule;  // ours
};
inline constexpr MinimaxKeys kMinimaxHfKeys = {"layer_types",
                                               "linear_attn_alpha_factor",
                                               "linear_attn_beta_factor",
                                               "full_attn_alpha_factor",
                                               "full_attn_beta_factor",
                                               "mlp_alpha_factor",
                                               "mlp_beta_factor",
                                               "minimax_hf"};
inline constexpr MinimaxKeys kMinimaxHubKeys = {"attn_type_list",
                                                "layernorm_linear_attention_alpha",
                                                "layernorm_linear_attention_beta",
                                                "layernorm_full_attention_alpha",
                                                "layernorm_full_attention_beta",
                                                "layernorm_mlp_alpha",
                                                "layernorm_mlp_beta",
                                                "alibi_layer"};

}  // namespace everlong
