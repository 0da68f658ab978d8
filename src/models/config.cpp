#include "models/config.h"

#include <algorithm>

#include "core/settings.h"
#include "mechanisms/mechanism.h"

namespace everlong {
namespace {

constexpr std::string_view kModelType = "everlong";
constexpr std::int64_t kMaxExperts = 65536;
constexpr double kMaxResidual = 1e6;
constexpr std::string_view kMlp = "mlp";

// "layer_types": a list of mechanism names, each of them known.
Result<std::vector<std::string>> read_layer_types(const nlohmann::json& list) {
  if (list.is_null())
    return invalid_argument(
        "layer_types is missing; a list with one mechanism name a layer is needed");
  if (!list.is_array() || list.empty() || list.size() > static_cast<std::size_t>(kMaxLayers))
    return invalid_argument("layer_types is not a list of 1 to ", kMaxLayers, " mechanism names");
  std::vector<std::string> names;
  for (const auto& item : list) {
    const std::string place = cat("layer_types[", names.size(), "] = ");
    if (!item.is_string())
      return invalid_argument(place, item.dump(),
                              " is not allowed; the name of a mechanism is needed");
    const auto mechanism = find_mechanism(item.get<std::string>());
    if (!mechanism.ok()) return invalid_argument(place, mechanism.status().message());
    names.push_back(item.get<std::string>());
  }
  return names;
}

// "residuals": {"lightning": {"alpha": 1.7, "beta": 0.9}, "mlp": {...}}.
Result<std::map<std::string, ModelConfig::Residual>> read_residuals(
    const nlohmann::json& object, const std::vector<std::string>& layer_types) {
  std::map<std::string, ModelConfig::Residual> residuals;
  if (object.is_null()) return residuals;
  if (!object.is_object())
    return invalid_argument("residuals = ", object.dump(), "; an object is needed");
  for (const auto& [part, factors] : object.items()) {
    if (part != kMlp && std::ranges::find(layer_types, part) == layer_types.end())
      return invalid_argument("residuals names \"", part, "\", which is neither \"", kMlp,
                              "\" nor a mechanism of layer_types");
    Settings s(factors, cat("residuals: ", part));
    residuals[part] = {s.number("alpha", 1, -kMaxResidual, kMaxResidual),
                       s.number("beta", 1, -kMaxResidual, kMaxResidual)};
    EVERLONG_RETURN_IF_ERROR(s.finish());
  }
  return residuals;
}

// "model_type" and "architectures" say which program a folder is for.
Status check_model_type(Settings& s) {
  s.choice("model_type", std::string(kModelType), {std::string(kModelType)});
  const nlohmann::json architectures = s.raw("architectures");
  if (architectures.is_null() || architectures == nlohmann::json::array({kModelType})) return {};
  return invalid_argument("architectures = ", architectures.dump(), " is not known; allowed: [\"",
                          kModelType, "\"]");
}

}  // namespace

Result<ModelConfig> ModelConfig::from_json(const nlohmann::json& object, const std::string& place) {
  Settings s(object, place);
  ModelConfig config;
  if (Status status = check_model_type(s); !status.ok()) s.fail(std::move(status));
  // The file's own dtype is that of its tensors; the key is there for other programs.
  s.choice("torch_dtype", "float32", {"float32", "bfloat16", "float16"});
  config.block =
      s.choice("block", config.block, {"transnormer", "llama", "gpt", "megalodon", "torchscale"});
  config.vocab_size = s.integer("vocab_size", config.vocab_size, 1, INT32_MAX);
  config.hidden_size = s.integer("hidden_size", config.hidden_size, 1, kMaxWidth);
  config.intermediate_size = s.integer("intermediate_size", config.intermediate_size, 1, kMaxWidth);
  config.norm_eps = s.number("norm_eps", config.norm_eps, 0, 1);
  config.num_experts = s.integer("num_experts", config.num_experts, 0, kMaxExperts);
  config.experts_per_token =
      s.integer("experts_per_token", config.experts_per_token, 1, kMaxExperts);
  config.residual_after_norm = s.boolean("residual_after_norm", config.residual_after_norm);
  config.gated_mlp = s.boolean("gated_mlp", config.gated_mlp);
  config.rescale_mlp = s.boolean("rescale_mlp", config.rescale_mlp);
  config.output_size = s.integer("output_size", config.output_size, 0, INT32_MAX);
  if (config.block != "megalodon")
    for (const char* key : {"gated_mlp", "rescale_mlp", "output_size"})
      if (s.has(key))
        s.fail(invalid_argument(key, " belongs to block \"megalodon\"; leave it out of block \"",
                                config.block, "\""));
  config.tie_word_embeddings = s.boolean("tie_word_embeddings", config.tie_word_embeddings);
  config.scale_embedding = s.boolean("scale_embedding", config.scale_embedding);
  config.initializer_range = s.number("initializer_range", config.initializer_range, 0, 10);
  config.landmark_id = s.integer("landmark_id", -1, -1, config.vocab_size - 1);
  config.landmark_predicted = s.boolean("landmark_predicted", false);
  config.tokenizer = s.text("tokenizer", config.tokenizer);

  if (auto names = read_layer_types(s.raw("layer_types")); names.ok()) {
    config.layer_types = *std::move(names);
  } else {
    s.fail(names.status());
  }
  if (auto residuals = read_residuals(s.raw("residuals"), config.layer_types); residuals.ok()) {
    config.residuals = *std::move(residuals);
  } else {
    s.fail(residuals.status());
  }
  const std::int64_t layers = s.integer("num_hidden_layers", config.num_layers(), 0, kMaxLayers);
  if (layers != config.num_layers())
    s.fail(invalid_argument("num_hidden_layers = ", layers, " but layer_types names ",
                            config.num_layers(),
                            " layers; correct one or leave num_hidden_layers out"));

  for (const Mechanism* mechanism : everlong::mechanisms()) {
    const std::string& name = mechanism->name;
    const nlohmann::json settings = s.raw(name);
    if (!s.has(name)) continue;
    if (!settings.is_object())
      s.fail(invalid_argument(name, " = ", settings.dump(),
                              " is not allowed; an object of settings is needed"));
    if (std::ranges::find(config.layer_types, name) == config.layer_types.end())
      s.fail(invalid_argument(
          name, " holds settings of a mechanism that no layer uses; name it in layer_types or ",
          "remove the object"));
    config.mechanisms[name] = settings;
  }
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return config;
}

Result<ModelConfig> ModelConfig::read(const fs::path& config_json) {
  EVERLONG_ASSIGN(const std::string text, read_file(config_json));
  const auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return corrupt(config_json.string(), ": is not a valid JSON object");
  return from_json(object, config_json.string());
}

nlohmann::json ModelConfig::to_json() const {
  nlohmann::json object = {{"model_type", kModelType},
                           {"architectures", nlohmann::json::array({kModelType})},
                           {"block", block},
                           {"vocab_size", vocab_size},
                           {"hidden_size", hidden_size},
                           {"intermediate_size", intermediate_size},
                           {"num_hidden_layers", num_layers()},
                           {"layer_types", layer_types},
                           {"norm_eps", norm_eps},
                           {"tie_word_embeddings", tie_word_embeddings},
                           {"scale_embedding", scale_embedding},
                           {"initializer_range", initializer_range},
                           {"tokenizer", tokenizer}};
  // What most models lack is left out of their files (which older programs read, too).
  if (num_experts > 0) {
    object["num_experts"] = num_experts;
    object["experts_per_token"] = experts_per_token;
  }
  if (landmark_id >= 0) {
    object["landmark_id"] = landmark_id;
    object["landmark_predicted"] = landmark_predicted;
  }
  if (residual_after_norm) object["residual_after_norm"] = true;
  if (!gated_mlp) object["gated_mlp"] = false;
  if (rescale_mlp) object["rescale_mlp"] = true;
  if (output_size > 0) object["output_size"] = output_size;
  for (const auto& [part, factors] : residuals)
    object["residuals"][part] = {{"alpha", factors.alpha}, {"beta", factors.beta}};
  for (const auto& [name, settings] : mechanisms) object[name] = settings;
  return object;
}

}  // namespace everlong
