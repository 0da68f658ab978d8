#include "models/published_landmark.h"

#include <cmath>

#include "core/settings.h"
#include "mechanisms/landmark/layer.h"
#include "models/published.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::int64_t kMostBlock = std::int64_t{1} << 20, kMostBlocks = std::int64_t{1} << 40;
// Of the released 7B and its run_test.py, whose config.json does not say them.
constexpr std::int64_t kLlamaLandmark = 32001, kLlamaEvery = 50, kPicks = 5;
// Of lm_benchmark: GPT-2's tokenizer with three ids behind it.
constexpr std::int64_t kGptLandmark = 50260, kGptEvery = 50, kGptVocab = 50304;
constexpr const char* kArchitecture = "lm_benchmark_landmark_gpt";
constexpr const char* kLandmarkKeys[] = {
    "mem_id",    "mem_freq",        "include_landmark_in_loss", "train_context_length",
    "mem_top_k", "mem_max_seq_len", "mem_max_cache_size"};

template <class... Parts>
Status refuse(const char* family, const Parts&... parts) {
  return unsupported("a \"", family, "\" config.json cannot say ", parts...);
}

// The settings that every layer of a landmark model has.
Result<landmark::LayerSettings> settings_of(const ModelConfig& config, const char* family) {
  for (std::size_t i = 0; i < config.layer_types.size(); ++i)
    if (config.layer_types[i] != "landmark")
      return refuse(family, "layer_types[", i, "] = \"", config.layer_types[i], "\"");
  if (config.landmark_id < 0) return refuse(family, "a model without landmark_id");
  const auto found = config.mechanisms.find("landmark");
  EVERLONG_ASSIGN(
      const auto s,
      landmark::read_settings(
          {.hidden_size = config.hidden_size,
           .num_layers = config.num_layers(),
           .norm_eps = config.norm_eps,
           .settings = found == config.mechanisms.end() ? json::object() : found->second}));
  if (!s.dense_training) return refuse(family, "landmark: training = \"as_streamed\"");
  if (s.retrieval.window > 0) return refuse(family, "landmark: window = ", s.retrieval.window);
  if (s.retrieval.granularity != landmark::Granularity::kTokenHead || s.retrieval.chunked)
    return refuse(family, "landmark: granularity or mode other than token_head, window");
  if (!s.pages.folder.empty()) return refuse(family, "landmark: pages");
  if (s.scale && *s.scale != 1 / std::sqrt(static_cast<double>(s.head_dim)))
    return refuse(family, "landmark: scale = ", *s.scale);
  return s;
}

json blocks_of(std::int64_t every, std::int64_t top_k, std::int64_t max_blocks) {
  json out = {{"block", every + 1}, {"top_k", top_k}};
  if (max_blocks > 0) out["max_blocks"] = max_blocks;
  return out;
}

}  // namespace

Result<ModelConfig> read_landmark_llama(const json& object, const std::string& place) {
  json plain = object, keys = json::object();
  for (const char* key : kLandmarkKeys) {
    if (object.contains(key)) keys[key] = object.at(key);
    plain.erase(key);
  }
  plain["model_type"] = "llama";
  EVERLONG_ASSIGN(ModelConfig config, config_from_published(plain, place));
  Settings s(keys, place);
  config.landmark_id = s.integer("mem_id", kLlamaLandmark, 0, INT32_MAX);
  const std::int64_t every = s.integer("mem_freq", kLlamaEvery, 1, kMostBlock - 1);
  config.landmark_predicted = s.boolean("include_landmark_in_loss", true);
  const std::int64_t top_k = s.integer("mem_top_k", kPicks, 1, kMostBlocks);
  const std::int64_t kept = s.integer("mem_max_cache_size", 0, 0, kMostBlocks);
  // How long the program's windows and chunks are, which this one does not depend on.
  s.raw("train_context_length");
  s.raw("mem_max_seq_len");
  if (config.landmark_id >= config.vocab_size)
    s.fail(invalid_argument("mem_id = ", config.landmark_id, " is outside the vocabulary of ",
                            config.vocab_size));
  EVERLONG_RETURN_IF_ERROR(s.finish());
  json settings = config.mechanisms.at("softmax");
  if (settings.contains("rotary_dim"))
    return unsupported(place, ": partial_rotary_factor is not offered with landmarks");
  settings.update(blocks_of(every, top_k, kept));
  config.mechanisms = {{"landmark", settings}};
  config.layer_types.assign(config.layer_types.size(), "landmark");
  return config;
}

Result<json> write_landmark_llama(const ModelConfig& config) {
  EVERLONG_ASSIGN(const auto s, settings_of(config, "landmark_llama"));
  if (s.rope != "half_split" || s.fused)
    return refuse("landmark_llama", "landmark: rope or projections of another kind");
  ModelConfig plain = config;
  plain.layer_types.assign(config.layer_types.size(), "softmax");
  plain.mechanisms = {{"softmax",
                       {{"num_heads", s.num_heads},
                        {"num_kv_heads", s.num_kv_heads},
                        {"head_dim", s.head_dim},
                        {"rope_theta", s.rope_theta}}}};
  plain.landmark_id = -1;
  EVERLONG_ASSIGN(json out, published_config(plain, "llama"));
  out.update({{"mem_id", config.landmark_id},
              {"mem_freq", s.retrieval.block - 1},
              {"include_landmark_in_loss", config.landmark_predicted}});
  if (s.retrieval.top_k > 0) out["mem_top_k"] = s.retrieval.top_k;
  if (s.retrieval.max_blocks > 0) out["mem_max_cache_size"] = s.retrieval.max_blocks;
  return out;
}

Result<ModelConfig> read_landmark_gpt(const json& object, const std::string& place) {
  Settings s(object, place);
  ModelConfig config;
  s.choice("architecture", kArchitecture, {kArchitecture});
  s.choice("positional_encoder", "rotary", {"rotary"});
  s.choice("softmax_func", "mem_opt", {"mem_opt", "mem", "nomem"});
  for (const char* key : {"sequence_length", "dropout", "torch_dtype"}) s.raw(key);
  if (s.boolean("bias", false)) s.fail(unsupported("bias = true; projections have no bias"));
  config.block = "gpt";
  config.vocab_size = s.integer("vocab_size", kGptVocab, 1, INT32_MAX);
  config.hidden_size = s.integer("n_embd", 768, 1, kMostBlock);
  config.intermediate_size = 4 * config.hidden_size;
  config.norm_eps = 1e-5;
  config.tie_word_embeddings = s.boolean("tied_head", true);
  config.tokenizer = "published";
  config.landmark_id = s.integer("landmark_id", kGptLandmark, 0, INT32_MAX);
  const std::int64_t every = s.integer("mem_freq", kGptEvery, 1, kMostBlock - 1);
  const std::int64_t layers = s.integer("n_layer", 12, 1, 4096);
  config.layer_types.assign(static_cast<std::size_t>(layers), "landmark");
  json settings = {{"num_heads", s.integer("n_head", 12, 1, 65536)},
                   {"rope", "interleaved"},
                   {"rope_theta", s.number("rope_base", 10000, 1, 1e30)},
                   {"projections", "fused"}};
  settings.update(blocks_of(every, s.integer("mem_cache_topk", kPicks, 1, kMostBlocks),
                            s.integer("mem_cache_size", 0, 0, kMostBlocks)));
  config.mechanisms["landmark"] = settings;
  if (config.landmark_id >= config.vocab_size)
    s.fail(invalid_argument("landmark_id = ", config.landmark_id, " is outside the vocabulary of ",
                            config.vocab_size));
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return config;
}

Result<json> write_landmark_gpt(const ModelConfig& config) {
  constexpr const char* kFamily = "landmark_gpt";
  EVERLONG_ASSIGN(const auto s, settings_of(config, kFamily));
  if (config.block != "gpt") return refuse(kFamily, "block = \"", config.block, "\"");
  if (s.rope != "interleaved" || !s.fused || s.num_heads * s.head_dim != config.hidden_size ||
      config.intermediate_size != 4 * config.hidden_size || config.norm_eps != 1e-5 ||
      config.landmark_predicted || config.num_experts > 0 || config.scale_embedding ||
      config.residual_after_norm || !config.residuals.empty())
    return refuse(kFamily, "anything but GPTBase's own shape, norm and loss");
  json out = {{"architecture", kArchitecture},     {"vocab_size", config.vocab_size},
              {"n_embd", config.hidden_size},      {"n_head", s.num_heads},
              {"n_layer", config.num_layers()},    {"bias", false},
              {"positional_encoder", "rotary"},    {"rope_base", s.rope_theta},
              {"softmax_func", "mem_opt"},         {"tied_head", config.tie_word_embeddings},
              {"landmark_id", config.landmark_id}, {"mem_freq", s.retrieval.block - 1}};
  if (s.retrieval.top_k > 0) out["mem_cache_topk"] = s.retrieval.top_k;
  if (s.retrieval.max_blocks > 0) out["mem_cache_size"] = s.retrieval.max_blocks;
  return out;
}

}  // namespace everlong
