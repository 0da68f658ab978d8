// config_from_published: one function a family, from the facts of its published code.
#include <algorithm>

#include "core/settings.h"
#include "models/published.h"
#include "models/published_family.h"
#include "models/published_landmark.h"
#include "models/published_megalodon.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxExperts = 65536;
constexpr double kMaxFactor = 1e6;
// Whatever they say, the numbers of a forward pass stay the same.
constexpr const char* kWithoutEffect[] = {
    "_name_or_path", "_attn_implementation", "architectures", "attention_dropout", "auto_map",
    "add_bos_token", "block_size", "bos_token_id", "dtype", "eos_token_id",
    "max_position_embeddings", "max_sequence_length", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "tokenizer_class", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
    // Of MiniMax-Text-01, whose shared expert is absent (shared_intermediate_size 0).
    "shared_moe_mode"};

// Heads of all kinds, after the checks that every family needs.
struct Heads {
  std::int64_t query = 1, kv = 1, dim = 1;
};

// A config.json, with what the families have in common.
class Reader {
 public:
  Reader(const json& config, const std::string& place) : s(config, place) {
    for (const char* key : kWithoutEffect) s.raw(key);
    if (s.has("quantization_config"))
      s.fail(
          unsupported("quantization_config: quantised weights are not read; use the folder of the ",
                      "plain weights"));
    config_.tokenizer = "published";
  }

  // `key` must have the value that this program computes with, or be absent.
  void only(const char* key, const json& value, std::string_view why) {
    const json given = s.raw(key);
    if (given.is_null() || given == value) return;
    s.fail(
        unsupported(key, " = ", given.dump(), " is not offered, only ", value.dump(), ": ", why));
  }

  std::int64_t size(const char* key, std::int64_t max) {
    if (!s.has(key)) s.fail(invalid_argument(key, " is missing; the model's shape needs it"));
    return s.integer(key, 1, 1, max);
  }

  // What llama and both minimax spell alike.
  void read_common() {
    config_.block = "llama";
    config_.vocab_size = size("vocab_size", INT32_MAX);
    config_.hidden_size = size("hidden_size", kMaxWidth);
    config_.intermediate_size = size("intermediate_size", kMaxWidth);
    config_.norm_eps = s.number("rms_norm_eps", 1e-6, 0, 1);
    config_.tie_word_embeddings = s.boolean("tie_word_embeddings", false);
    config_.initializer_range = s.number("initializer_range", 0.02, 0, 10);
    only("hidden_act", "silu", "the gated MLPs use silu");
    only("attention_bias", false, "projections have no bias");
    only("sliding_window", nullptr, "this family attends to the whole past");
  }

  Heads read_heads() {
    Heads heads;
    heads.query = size("num_attention_heads", kMaxHeads);
    heads.kv = s.integer("num_key_value_heads", heads.query, 1, kMaxHeads);
    if (!s.has("head_dim") && config_.hidden_size % heads.query != 0)
      s.fail(invalid_argument("hidden_size ", config_.hidden_size,
                              " does not divide among num_attention_heads ", heads.query));
    heads.dim = s.integer("head_dim", std::max<std::int64_t>(config_.hidden_size / heads.query, 1),
                          1, kMaxWidth);
    return heads;
  }

  // The softmax layers' settings. Newer files hold the rotary embedding in rope_parameters, older
  // ones at the top level.
  json read_softmax(const Heads& heads) {
    json out = {{"num_heads", heads.query}, {"num_kv_heads", heads.kv}, {"head_dim", heads.dim}};
    double theta = s.number("rope_theta", 10000, 1, 1e30);
    double share = s.number("partial_rotary_factor", 1, 0, 1);
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      const json given = s.raw(key);
      if (given.is_null()) continue;
      Settings rope(given, key);
      theta = rope.number("rope_theta", theta, 1, 1e30);
      share = rope.number("partial_rotary_factor", share, 0, 1);
      for (const char* type : {"rope_type", "type"})
        if (const json kind = rope.raw(type); !kind.is_null() && kind != "default")
          s.fail(unsupported(key, ": ", type, " = ", kind.dump(),
                             " is not offered, only \"default\": angles are t theta^(-2i/d)"));
      if (const Status status = rope.finish(); !status.ok()) s.fail(status);
    }
    out["rope_theta"] = theta;
    const auto rotary =
        s.integer("rotary_dim", static_cast<std::int64_t>(share * static_cast<double>(heads.dim)),
                  0, heads.dim);
    if (rotary != heads.dim) out["rotary_dim"] = rotary;
    return out;
  }

  Result<ModelConfig> finish() {
    EVERLONG_RETURN_IF_ERROR(s.finish());
    return std::move(config_);
  }

  Settings s;
  ModelConfig config_;
};

Result<ModelConfig> read_llama(const json& object, const std::string& place) {
  Reader r(object, place);
  r.read_common();
  r.only("mlp_bias", false, "projections have no bias");
  const std::int64_t layers = r.size("num_hidden_layers", kMaxLayers);
  r.config_.layer_types.assign(static_cast<std::size_t>(layers), "softmax");
  r.config_.mechanisms["softmax"] = r.read_softmax(r.read_heads());
  return r.finish();
}

// 0 or 1 a layer -> the room's setting; no list: none.
json read_lrpe(Reader& r, std::int64_t layers) {
  const json list = r.s.raw("linear_use_lrpe_list");
  if (list.is_null() || (list.is_array() && list.empty())) return "none";
  const auto flag = [](const json& item) { return item == 0 || item == 1; };
  if (!list.is_array() || static_cast<std::int64_t>(list.size()) != layers ||
      !std::ranges::all_of(list, flag)) {
    r.s.fail(invalid_argument("linear_use_lrpe_list = ", list.dump(),
                              "; a list of 0 or 1 for each of ", layers, " layers is needed"));
    return "none";
  }
  const auto ones = std::ranges::count(list, json(1));
  if (ones == 0) return "none";
  if (ones == layers) return "all";
  return ones == 1 && list.front() == 1 ? json("first_layer") : list;
}

Result<ModelConfig> read_transnormer(const json& object, const std::string& place) {
  Reader r(object, place);
  ModelConfig& config = r.config_;
  config.block = "transnormer";
  config.vocab_size = r.size("vocab_size", INT32_MAX);
  config.hidden_size = r.size("decoder_embed_dim", kMaxWidth);
  config.intermediate_size = r.size("glu_dim", kMaxWidth);
  config.norm_eps = 1e-6;  // of the published SimpleRMSNorm; no key changes it
  config.scale_embedding = !r.s.boolean("no_scale_embedding", false);
  // The published class does not say whether the head is the embedding, and files hold either.
  config.tie_word_embeddings = r.s.boolean("tie_word_embeddings", false);
  config.initializer_range = r.s.number("init_std", 0.02, 0, 10);
  r.only("bias", false, "projections have no bias");
  r.only("norm_type", "simplermsnorm", "the norm of the released models");
  if (r.s.has("gate_dim"))
    r.s.fail(unsupported("gate_dim: the low-rank gate of TransNormerLLM3 is not offered"));
  const std::int64_t layers = r.size("decoder_layers", kMaxLayers);
  const std::int64_t heads = r.size("decoder_attention_heads", kMaxHeads);
  const std::int64_t width = r.s.integer("hidden_dim", config.hidden_size, 1, kMaxWidth);
  if (width % heads != 0)
    r.s.fail(invalid_argument("hidden_dim ", width,
                              " does not divide among decoder_attention_heads ", heads));
  const std::string act = r.s.choice("linear_act_fun", "silu", {"silu", "swish", "none"});
  config.layer_types.assign(static_cast<std::size_t>(layers), "lightning");
  config.mechanisms["lightning"] = {{"num_heads", heads},
                                    {"head_dim", std::max<std::int64_t>(width / heads, 1)},
                                    {"slope_rule", "alibi_layer"},
                                    {"activation", act == "none" ? "none" : "silu"},
                                    {"lrpe", read_lrpe(r, layers)}};
  return r.finish();
}

// The list of layers in either spelling -> mechanism names.
std::vector<std::string> read_layers(Reader& r, const MinimaxKeys& keys, std::int64_t layers) {
  const json list = r.s.raw(keys.layers);
  std::vector<std::string> names;
  for (const json& item : list.is_array() ? list : json::array()) {
    const bool lightning = item == 0 || item == "linear_attention";
    const bool softmax = item == 1 || item == "full_attention";
    if (lightning || softmax) names.emplace_back(lightning ? "lightning" : "softmax");
  }
  if (static_cast<std::int64_t>(names.size()) != layers || names.size() != list.size())
    r.s.fail(invalid_argument(keys.layers, " is ", list.is_null() ? "missing" : list.dump(),
                              "; one of ",
                              &keys == &kMinimaxHfKeys ? "\"linear_attention\", \"full_attention\""
                                                       : "0 (lightning), 1 (softmax)",
                              " for each of ", layers, " layers is needed"));
  return names;
}

Result<ModelConfig> read_minimax(const json& object, const std::string& place, bool from_hub) {
  const MinimaxKeys& keys = from_hub ? kMinimaxHubKeys : kMinimaxHfKeys;
  Reader r(object, place);
  ModelConfig& config = r.config_;
  r.read_common();
  const std::int64_t layers = r.size("num_hidden_layers", kMaxLayers);
  config.layer_types = read_layers(r, keys, layers);
  config.num_experts = r.size("num_local_experts", kMaxExperts);
  config.experts_per_token = r.size("num_experts_per_tok", kMaxExperts);
  // The hub's class computes either form; transformers' is always the second.
  config.residual_after_norm = from_hub ? r.s.boolean("postnorm", false) : true;
  if (from_hub) {
    r.only("use_qk_norm", false, "queries and keys are not normalised");
    const json shared = r.s.raw("shared_intermediate_size");
    if (!shared.is_null() && shared != 0 && shared != json::array({0}))
      r.s.fail(unsupported("shared_intermediate_size = ", shared.dump(),
                           " is not offered, only 0: no released model has a shared expert"));
  }
  const Heads heads = r.read_heads();
  const json softmax = r.read_softmax(heads);
  const json lightning = {{"form", "minimax"},
                          {"num_heads", heads.query},
                          {"head_dim", heads.dim},
                          {"slope_rule", keys.slope_rule}};
  const auto factor = [&](const char* key) { return r.s.number(key, 1, -kMaxFactor, kMaxFactor); };
  const auto keep = [&](const std::string& part, ModelConfig::Residual factors, bool used) {
    if (used && factors != ModelConfig::Residual{}) config.residuals[part] = factors;
  };
  const auto uses = [&](const char* name) {
    return std::ranges::find(config.layer_types, name) != config.layer_types.end();
  };
  if (uses("lightning")) config.mechanisms["lightning"] = lightning;
  if (uses("softmax")) config.mechanisms["softmax"] = softmax;
  keep("lightning", {factor(keys.linear_alpha), factor(keys.linear_beta)}, uses("lightning"));
  keep("softmax", {factor(keys.full_alpha), factor(keys.full_beta)}, uses("softmax"));
  keep("mlp", {factor(keys.mlp_alpha), factor(keys.mlp_beta)}, true);
  return r.finish();
}

}  // namespace

Result<ModelConfig> config_from_published(const json& config, const std::string& place) {
  if (!config.is_object()) return invalid_argument(place, ": is not a JSON object");
  const auto family = recognise(config);
  if (!family.ok()) return family.status().at(place);
  switch (*family) {
    case Family::kLlama:
      return read_llama(config, place);
    case Family::kTransnormer:
      return read_transnormer(config, place);
    case Family::kMinimax:
      return read_minimax(config, place, /*from_hub=*/false);
    case Family::kLandmarkLlama:
      return read_landmark_llama(config, place);
    case Family::kLandmarkGpt:
      return read_landmark_gpt(config, place);
    case Family::kMegalodon:
      return read_megalodon(config, place);
    case Family::kMinimaxText01:
      break;
  }
  return read_minimax(config, place, /*from_hub=*/true);
}

}  // namespace everlong
