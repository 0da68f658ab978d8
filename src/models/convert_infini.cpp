#include "models/convert_infini.h"

#include <algorithm>

#include "mechanisms/softmax/layer.h"

namespace everlong {

Result<ModelConfig> with_infini_layers(const ModelConfig& config, const nlohmann::json& settings) {
  if (std::ranges::count(config.layer_types, "softmax") == 0)
    return invalid_argument("the model has no softmax layer; those of ",
                            join(config.layer_types, ", "),
                            " cannot become Infini-attention layers");
  if (config.mechanisms.contains("infini"))
    return invalid_argument("the model has Infini-attention layers already");
  LayerSpec spec;
  spec.hidden_size = config.hidden_size;
  spec.num_layers = config.num_layers();
  const auto found = config.mechanisms.find("softmax");
  if (found != config.mechanisms.end()) spec.settings = found->second;
  EVERLONG_ASSIGN(const softmax::LayerSettings was, softmax::read_settings(spec));
  if (was.window > 0)
    return unsupported("the softmax layers have a window of ", was.window,
                       "; Infini-attention sees its whole segment, so the model would change");
  if (was.rope != "none" && was.rotary_dim != was.head_dim)
    return unsupported("the softmax layers turn ", was.rotary_dim, " of ", was.head_dim,
                       " coordinates; Infini-attention turns all of them");
  ModelConfig out = config;
  nlohmann::json room = {{"num_heads", was.num_heads},   {"num_kv_heads", was.num_kv_heads},
                         {"head_dim", was.head_dim},     {"rope", was.rope},
                         {"rope_theta", was.rope_theta}, {"gate_init", kConvertedGateInit}};
  if (was.scale) room["scale"] = *was.scale;
  room.update(settings);
  out.mechanisms.erase("softmax");
  out.mechanisms["infini"] = room;
  std::ranges::replace(out.layer_types, "softmax", "infini");
  if (const auto residual = out.residuals.find("softmax"); residual != out.residuals.end()) {
    out.residuals["infini"] = residual->second;
    out.residuals.erase("softmax");
  }
  return out;
}

}  // namespace everlong
