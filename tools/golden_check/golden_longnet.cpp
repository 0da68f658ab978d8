// LongNet's layers, causal and bidirectional, with the published weights' names.
#include <ATen/ATen.h>

#include "golden_kinds.h"
#include "models/torchscale_layer.h"

namespace everlong::golden {
namespace {

using nlohmann::json;

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

// Where the case says them, the room's settings under our names.
json settings_of(const json& params, bool causal) {
  json settings = {{"form", "torchscale"},
                   {"num_heads", params.value("heads", 1)},
                   {"subln", params.value("subln", true)},
                   {"bias", params.value("bias", true)},
                   {"norm_eps", params.value("ln_eps", 1e-5)},
                   {"rope", params.value("xpos", false) ? "xpos" : "none"},
                   {"xpos_scale_base", params.value("xpos_scale_base", 512.0)},
                   {"causal", params.value("causal", causal)}};
  for (const char* key :
       {"segment_length", "dilated_ratio", "offset_rule", "pad", "mixing_grad", "scale", "beyond"})
    if (params.contains(key)) settings[key] = params.at(key);
  return settings;
}

Result<std::shared_ptr<TorchscaleLayer>> make_layer(const Case& wanted, bool causal) {
  const json& params = wanted.call.params;
  if (params.value("gelu", "erf") != "erf") return unsupported("the GELU is the exact one");
  if (params.value("alignment", "segment_start") != "segment_start")
    return unsupported("lattices start at their segment");
  const std::int64_t width = wanted.call.inputs.at("x").size(2);
  TorchscaleSettings settings;
  EVERLONG_ASSIGN(
      settings.attention,
      longnet::read_settings({.hidden_size = width, .settings = settings_of(params, causal)}));
  settings.ffn_dim = params.value("ffn_dim", 4 * width);
  settings.normalize_before = params.value("normalize_before", true);
  auto layer = std::make_shared<TorchscaleLayer>(settings);
  layer->to(at::kDouble);
  std::size_t used = 1;  // x
  const at::NoGradGuard off;
  for (auto& item : layer->named_parameters()) {
    const auto found = wanted.call.inputs.find("w." + item.key());
    if (found == wanted.call.inputs.end() || found->second.sizes() != item.value().sizes())
      return corrupt("the case has no w.", item.key(), " of shape ", item.value().sizes());
    item.value().copy_(found->second);
    ++used;
  }
  used += wanted.call.inputs.count("w.self_attn.xpos.scale");  // follows from the head's size
  if (used != wanted.call.inputs.size())
    return corrupt("the case has inputs or weights that the layer does not know");
  return layer;
}

// x in pieces through one state, or (no pieces) without any; with gradients where the case has
// them.
OpResult run(const Case& wanted, TorchscaleLayer& layer, const std::vector<std::int64_t>& pieces) {
  const auto dtype = layer.parameters().front().scalar_type();
  const at::Tensor x =
      wanted.call.inputs.at("x").detach().to(dtype).clone().set_requires_grad(true);
  OpResult result;
  if (pieces.empty()) {
    result.out["x"] = layer.forward(x, {}, nullptr);
  } else {
    const auto state = layer.mixer().make_state(x.size(0));
    std::vector<at::Tensor> parts;
    std::int64_t begin = 0;
    for (const std::int64_t count : pieces) {
      parts.push_back(layer.forward(x.narrow(1, begin, count), {}, state.get()));
      begin += count;
    }
    result.out["x"] = at::cat(parts, 1);
  }
  const auto grad = wanted.call.grad_out.find("x");
  if (grad == wanted.call.grad_out.end()) return result;
  layer.zero_grad();
  (result.out["x"] * grad->second.to(dtype)).sum().backward();
  result.grad["x"] = x.grad();
  for (const auto& item : layer.named_parameters())
    result.grad["w." + item.key()] = item.value().grad().clone();
  return result;
}

}  // namespace

std::optional<Verdict> check_longnet(const Case& wanted, const std::string& kind) {
  const bool decoder = kind == "longnet_decoder_layer";
  if (!decoder && kind != "longnet_encoder_layer") return {};
  const auto x = wanted.call.inputs.find("x");
  if (x == wanted.call.inputs.end() || x->second.dim() != 3)
    return failed("the case has no in.x of three dimensions");
  const auto layer = make_layer(wanted, decoder);
  if (!layer.ok()) return failed(layer.status().message());
  const std::int64_t T = x->second.size(1);
  const bool causal = wanted.call.params.value("causal", decoder);
  std::vector<std::vector<std::int64_t>> ways = {{}};
  if (causal) ways.push_back({T});
  if (causal && T > 2) ways.push_back({T / 2, 1, T - T / 2 - 1});
  double worst = 0, rounding = 0;
  for (const auto& pieces : ways)
    if (const auto why = difference(wanted, run(wanted, **layer, pieces), worst))
      return failed(cat(pieces.empty() ? "one pass" : cat(pieces.size(), " pieces with a state"),
                        ": ", *why));
  (*layer)->to(at::kFloat);
  // Gradients that are zero in exact arithmetic (of the keys' bias, which moves all scores of a row
  // alike) are nothing but rounding in fp32: a share of their size means nothing.
  Case rounded = wanted;
  std::erase_if(rounded.grad, [](const auto& item) {
    return item.second.numel() > 0 && item.second.abs().max().template item<double>() < 1e-10;
  });
  for (const auto& pieces : ways)
    if (const auto why = difference(rounded, run(wanted, **layer, pieces), rounding,
                                    everywhere(wanted, kLayerFloat32)))
      return failed(cat("in fp32: ", *why));
  return Verdict{Outcome::kPassed, cat(causal ? "one pass and in pieces" : "one pass",
                                       "; largest error ", worst, "; in fp32 ", rounding)};
}

}  // namespace everlong::golden
