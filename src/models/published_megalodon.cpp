#include "models/published_megalodon.h"

#include <cmath>

#include "core/settings.h"
#include "mechanisms/megalodon/layer.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr const char* kName = "megalodon";
constexpr const char* kMegalodonWithoutEffect[] = {
    "model_type",     "architectures",     "init_mode",      "efficient_attn",
    "dropout",        "attention_dropout", "hidden_dropout", "torch_dtype",
    "layerwise_ckpt", "bos_token_id",      "eos_token_id",   "pad_token_id"};

template <class... Parts>
Status refuse(const Parts&... parts) {
  return unsupported("a \"megalodon\" config.json cannot say ", parts...);
}

}  // namespace

Result<ModelConfig> read_megalodon(const json& object, const std::string& place) {
  Settings s(object, place);
  for (const char* key : kMegalodonWithoutEffect) s.raw(key);
  const auto size = [&](const char* key, std::int64_t max) {
    if (!s.has(key)) s.fail(invalid_argument(key, " is missing; the model's shape needs it"));
    return s.integer(key, 1, 1, max);
  };
  ModelConfig config;
  config.block = kName;
  config.tokenizer = "published";
  config.hidden_size = size("model_dim", kMaxWidth);
  config.intermediate_size = size("ffn_hidden_dim", kMaxWidth);
  config.vocab_size = size("vocab_size", INT32_MAX);
  const std::int64_t output = s.integer("output_size", -1, -1, INT32_MAX);
  config.tie_word_embeddings = s.boolean("share_emb", false);
  config.scale_embedding = s.boolean("scale_emb", false);
  config.gated_mlp = s.boolean("swiglu", false);
  config.rescale_mlp = s.boolean("rescale_nffn", false);
  config.norm_eps = s.number("norm_eps", megalodon::kNormEps, 0, 1);
  config.initializer_range = 1 / std::sqrt(static_cast<double>(config.hidden_size));
  if (output == 0) s.fail(invalid_argument("output_size = 0; -1 means vocab_size"));
  // A tied head has the rows of the embedding, whatever the file says.
  config.output_size = output <= 0 || output == config.vocab_size ? 0 : output;
  const std::int64_t layers = size("num_layers", kMaxLayers);
  config.layer_types.assign(static_cast<std::size_t>(layers), kName);
  json settings = {{"num_heads", size("num_heads", kMaxHeads)},
                   {"z_dim", size("z_dim", kMaxWidth)},
                   {"value_dim", size("value_dim", kMaxWidth)},
                   {"cema_ndim", s.integer("cema_ndim", 16, 1, megalodon::kMostModes)},
                   {"chunk_size", size("chunk_size", std::int64_t{1} << 40)},
                   {"norm_num_groups", size("norm_num_groups", kMaxWidth)},
                   {"norm_affine", s.boolean("norm_affine", true)}};
  // null: the default, which is not written either.
  if (!s.raw("rope_base").is_null())
    if (const double base = s.number("rope_base", megalodon::kRopeBase, 1, 1e30);
        base != megalodon::kRopeBase)
      settings["rope_base"] = base;
  config.mechanisms[kName] = settings;
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return config;
}

Result<json> write_megalodon(const ModelConfig& config) {
  if (config.block != kName) return refuse("block = \"", config.block, "\"");
  const auto found = config.mechanisms.find(kName);
  EVERLONG_ASSIGN(
      const auto s,
      megalodon::read_settings(
          {.hidden_size = config.hidden_size,
           .num_layers = config.num_layers(),
           .norm_eps = config.norm_eps,
           .settings = found == config.mechanisms.end() ? json::object() : found->second}));
  if (s.norm_eps != config.norm_eps) return refuse("megalodon: a norm_eps of its own");
  if (s.norm_window.bounded()) return refuse("megalodon: norm_window");
  if (!s.moving_average) return refuse("megalodon: moving_average = \"off\"");
  return json{{"model_type", kName},
              {"num_layers", config.num_layers()},
              {"model_dim", config.hidden_size},
              {"z_dim", s.z_dim},
              {"value_dim", s.value_dim},
              {"num_heads", s.num_heads},
              {"ffn_hidden_dim", config.intermediate_size},
              {"cema_ndim", s.cema_ndim},
              {"chunk_size", s.chunk_size},
              {"vocab_size", config.vocab_size},
              {"output_size", config.output_size > 0 ? config.output_size : -1},
              {"norm_num_groups", s.norm_num_groups},
              {"norm_affine", s.norm_affine},
              {"norm_eps", config.norm_eps},
              {"rope_base", s.rope_base},
              {"swiglu", config.gated_mlp},
              {"rescale_nffn", config.rescale_mlp},
              {"scale_emb", config.scale_embedding},
              {"share_emb", config.tie_word_embeddings}};
}

}  // namespace everlong
