// published_config: what a family can say, written in its words; all else is refused.
#include <algorithm>
#include <cmath>
#include <optional>

#include "mechanisms/lightning/layer.h"
#include "mechanisms/softmax/layer.h"
#include "models/published.h"
#include "models/published_family.h"
#include "models/published_landmark.h"
#include "models/published_megalodon.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr double kNormEps = 1e-6;  // where the published code has it built in

// A model as its layers see it: defaults filled in.
struct View {
  const ModelConfig& config;
  std::string family;
  std::vector<std::optional<lightning::LayerSettings>> lightning;  // one a layer
  std::optional<softmax::LayerSettings> softmax;                   // the same in every layer

  template <class... Parts>
  Status refuse(const Parts&... parts) const {
    return unsupported("a \"", family, "\" config.json cannot say ", parts...);
  }
};

Result<View> look_at(const ModelConfig& config, std::string_view family) {
  View view{config, std::string(family), {}, {}};
  for (std::int64_t i = 0; i < config.num_layers(); ++i) {
    const std::string& name = config.layer_types[static_cast<std::size_t>(i)];
    const auto settings = config.mechanisms.find(name);
    const LayerSpec spec{
        .hidden_size = config.hidden_size,
        .layer_index = i,
        .num_layers = config.num_layers(),
        .norm_eps = config.norm_eps,
        .settings = settings == config.mechanisms.end() ? json::object() : settings->second};
    view.lightning.emplace_back();
    if (name == "lightning") {
      EVERLONG_ASSIGN(view.lightning.back(), lightning::LayerSettings::read(spec));
    } else if (name == "softmax") {
      EVERLONG_ASSIGN(view.softmax, softmax::read_settings(spec));
    } else {
      return view.refuse("layer_types[", i, "] = \"", name, "\"");
    }
  }
  return view;
}

Status check_plain(const View& v, std::string_view block) {
  const ModelConfig& config = v.config;
  if (config.block != block) return v.refuse("block = \"", config.block, "\"");
  if (config.landmark_id >= 0) return v.refuse("landmark_id = ", config.landmark_id);
  if (config.scale_embedding && block != "transnormer") return v.refuse("scale_embedding = true");
  return {};
}

// Neither experts nor weighed residuals.
Status check_dense(const View& v) {
  const ModelConfig& config = v.config;
  if (config.num_experts > 0) return v.refuse("num_experts = ", config.num_experts);
  if (config.residual_after_norm) return v.refuse("residual_after_norm = true");
  for (const auto& [part, factors] : config.residuals)
    if (factors != ModelConfig::Residual{}) return v.refuse("residuals of \"", part, "\"");
  return {};
}

Status check_softmax(const View& v, bool whole_head) {
  const softmax::LayerSettings& s = *v.softmax;
  if (s.rope != "half_split") return v.refuse("softmax: rope = \"", s.rope, "\"");
  if (s.window > 0) return v.refuse("softmax: window = ", s.window);
  if (s.scale && *s.scale != 1 / std::sqrt(static_cast<double>(s.head_dim)))
    return v.refuse("softmax: scale = ", *s.scale);
  if (whole_head && s.rotary_dim != s.head_dim)
    return v.refuse("softmax: rotary_dim = ", s.rotary_dim, " of head_dim ", s.head_dim,
                    ": its program turns whole heads");
  return {};
}

json common_keys(const ModelConfig& config, const char* model_type, const char* architecture) {
  return {{"model_type", model_type},
          {"architectures", json::array({architecture})},
          {"vocab_size", config.vocab_size},
          {"tie_word_embeddings", config.tie_word_embeddings}};
}

void add_llama_keys(json& out, const ModelConfig& config, const softmax::LayerSettings& s) {
  out.update({{"hidden_size", config.hidden_size},
              {"intermediate_size", config.intermediate_size},
              {"num_hidden_layers", config.num_layers()},
              {"num_attention_heads", s.num_heads},
              {"num_key_value_heads", s.num_kv_heads},
              {"head_dim", s.head_dim},
              {"hidden_act", "silu"},
              {"rms_norm_eps", config.norm_eps},
              {"rope_theta", s.rope_theta},  // where every version of the programs reads it
              {"initializer_range", config.initializer_range}});
}

Result<json> write_llama(const View& v) {
  EVERLONG_RETURN_IF_ERROR(check_plain(v, "llama"));
  EVERLONG_RETURN_IF_ERROR(check_dense(v));
  for (std::size_t i = 0; i < v.lightning.size(); ++i)
    if (v.lightning[i]) return v.refuse("layer_types[", i, "] = \"lightning\"");
  EVERLONG_RETURN_IF_ERROR(check_softmax(v, /*whole_head=*/true));
  json out = common_keys(v.config, "llama", "LlamaForCausalLM");
  add_llama_keys(out, v.config, *v.softmax);
  out["attention_bias"] = out["mlp_bias"] = false;
  return out;
}

Result<json> write_transnormer(const View& v) {
  EVERLONG_RETURN_IF_ERROR(check_plain(v, "transnormer"));
  EVERLONG_RETURN_IF_ERROR(check_dense(v));
  const ModelConfig& config = v.config;
  if (v.softmax) return v.refuse("softmax layers");
  if (config.norm_eps != kNormEps) return v.refuse("norm_eps = ", config.norm_eps);
  json lrpe = json::array();
  for (const auto& layer : v.lightning) {
    if (layer->form != lightning::Form::kTransnormer)
      return v.refuse("lightning: form = \"minimax\"");
    if (layer->slope_rule != lightning::SlopeRule::kAlibiLayer)
      return v.refuse("lightning: a slope_rule other than \"alibi_layer\"");
    if (layer->norm_eps != kNormEps) return v.refuse("lightning: norm_eps = ", layer->norm_eps);
    lrpe.push_back(layer->lrpe ? 1 : 0);
  }
  const lightning::LayerSettings& first = *v.lightning.front();
  json out = common_keys(config, "transnormer", "TransnormerForCausalLM");
  out.update(
      {{"decoder_embed_dim", config.hidden_size},
       {"decoder_layers", config.num_layers()},
       {"decoder_attention_heads", first.num_heads},
       {"hidden_dim", first.num_heads * first.head_dim},
       {"glu_dim", config.intermediate_size},
       {"linear_use_lrpe_list", lrpe},
       {"linear_act_fun", first.activation == lightning::Activation::kSilu ? "silu" : "none"},
       {"norm_type", "simplermsnorm"},
       {"no_scale_embedding", !config.scale_embedding},
       {"bias", false},
       {"init_std", config.initializer_range}});
  return out;
}

// The lightning layers of a MiniMax model, which share their heads with its softmax layers.
Status check_minimax_lightning(const View& v, const MinimaxKeys& keys) {
  for (const auto& layer : v.lightning) {
    if (!layer) continue;
    if (layer->form != lightning::Form::kMinimax)
      return v.refuse("lightning: form = \"transnormer\"");
    if (layer->slope_rule != lightning::parse_slope_rule(keys.slope_rule).value())
      return v.refuse("lightning: a slope_rule other than \"", keys.slope_rule, "\"");
    if (layer->activation != lightning::Activation::kSilu)
      return v.refuse("lightning: activation = \"none\"");
    if (layer->norm_eps != kNormEps) return v.refuse("lightning: norm_eps = ", layer->norm_eps);
    if (v.softmax &&
        (layer->num_heads != v.softmax->num_heads || layer->head_dim != v.softmax->head_dim))
      return v.refuse("lightning and softmax heads of different number or size");
  }
  return {};
}

Result<json> write_minimax(const View& v, bool for_hub) {
  const MinimaxKeys& keys = for_hub ? kMinimaxHubKeys : kMinimaxHfKeys;
  const ModelConfig& config = v.config;
  EVERLONG_RETURN_IF_ERROR(check_plain(v, "llama"));
  if (config.num_experts == 0) return v.refuse("a model without experts");
  if (!for_hub && !config.residual_after_norm) return v.refuse("residual_after_norm = false");
  EVERLONG_RETURN_IF_ERROR(check_minimax_lightning(v, keys));
  softmax::LayerSettings heads;
  if (v.softmax) {
    EVERLONG_RETURN_IF_ERROR(check_softmax(v, /*whole_head=*/!for_hub));
    heads = *v.softmax;
  } else {  // unused by any layer, but the keys are there
    heads.num_heads = heads.num_kv_heads = v.lightning.front()->num_heads;
    heads.head_dim = heads.rotary_dim = v.lightning.front()->head_dim;
  }
  json out = for_hub ? common_keys(config, "minimax_text_01", "MiniMaxText01ForCausalLM")
                     : common_keys(config, "minimax", "MiniMaxForCausalLM");
  add_llama_keys(out, config, heads);
  json layers = json::array();
  for (const std::string& name : config.layer_types) {
    const bool lightning = name == "lightning";
    layers.push_back(for_hub ? json(lightning ? 0 : 1)
                             : json(lightning ? "linear_attention" : "full_attention"));
  }
  const auto linear = config.residual("lightning"), full = config.residual("softmax"),
             mlp = config.residual("mlp");
  out.update({{keys.layers, layers},
              {"num_local_experts", config.num_experts},
              {"num_experts_per_tok", config.experts_per_token},
              {keys.linear_alpha, linear.alpha},
              {keys.linear_beta, linear.beta},
              {keys.full_alpha, full.alpha},
              {keys.full_beta, full.beta},
              {keys.mlp_alpha, mlp.alpha},
              {keys.mlp_beta, mlp.beta}});
  if (for_hub)
    out.update({{"postnorm", config.residual_after_norm},
                {"rotary_dim", heads.rotary_dim},
                {"shared_intermediate_size", 0}});
  return out;
}

}  // namespace

Result<json> published_config(const ModelConfig& config, std::string_view name) {
  EVERLONG_ASSIGN(const Family family, parse_family(name));
  if (family == Family::kLandmarkLlama) return write_landmark_llama(config);
  if (family == Family::kLandmarkGpt) return write_landmark_gpt(config);
  if (family == Family::kMegalodon) return write_megalodon(config);
  EVERLONG_ASSIGN(const View view, look_at(config, name));
  switch (family) {
    case Family::kLlama:
      return write_llama(view);
    case Family::kTransnormer:
      return write_transnormer(view);
    case Family::kMinimax:
      return write_minimax(view, /*for_hub=*/false);
    default:
      break;
  }
  return write_minimax(view, /*for_hub=*/true);
}

Result<std::string> family_of(const ModelConfig& config) {
  std::string reasons;
  for (const std::string& family : published_families()) {
    const auto written = published_config(config, family);
    if (written.ok()) return family;
    reasons += cat(reasons.empty() ? "" : "; ", written.status().message());
  }
  return unsupported("no published family describes this model: ", reasons);
}

}  // namespace everlong
