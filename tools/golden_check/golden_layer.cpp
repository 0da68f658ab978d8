#include <ATen/ATen.h>

#include <numeric>
#include <span>

#include "golden_kinds.h"
#include "mechanisms/mechanism.h"

namespace everlong::golden {
namespace {

using nlohmann::json;

// How a case's params become the room's settings.
struct LayerKind {
  const char *mechanism, *kind;
  json (*settings)(const json& params);
};

json lightning_settings(const json& params, const char* form) {
  json settings = {{"form", form}, {"activation", "none"}};
  const std::string act = params.value("act", "silu");
  if (act == "silu" || act == "swish") settings["activation"] = "silu";
  const std::pair<const char*, const char*> same[] = {{"n_heads", "num_heads"},
                                                      {"head_dim", "head_dim"},
                                                      {"slope_rule", "slope_rule"},
                                                      {"norm_eps", "norm_eps"}};
  for (const auto& [theirs, ours] : same)
    if (params.contains(theirs)) settings[ours] = params.at(theirs);
  return settings;
}

json minimax_settings(const json& params) { return lightning_settings(params, "minimax"); }

json transnormer_settings(const json& params) {
  json settings = lightning_settings(params, "transnormer");
  settings["lrpe"] = params.value("lrpe", false) ? "all" : "none";
  return settings;
}

constexpr LayerKind kKinds[] = {
    {"lightning", "minimax_lightning_layer", minimax_settings},
    {"lightning", "tnl_token_mixer", transnormer_settings},
};

// The mixer with the weights w.*: every parameter, and nothing else.
Result<std::shared_ptr<Mixer>> make_mixer(const Case& wanted, const LayerKind& kind) {
  const json& params = wanted.call.params;
  EVERLONG_ASSIGN(const Mechanism* room, find_mechanism(kind.mechanism));
  LayerSpec spec;
  spec.hidden_size = wanted.call.inputs.at("x").size(2);
  spec.layer_index = params.value("layer_idx", 0);
  spec.num_layers = params.value("n_layers", 1);
  spec.settings = kind.settings(params);
  EVERLONG_ASSIGN(auto mixer, room->make_layer(spec));
  mixer->to(at::kDouble);
  std::size_t used = 1;  // x
  const at::NoGradGuard off;
  for (auto& item : mixer->named_parameters()) {
    const auto found = wanted.call.inputs.find("w." + item.key());
    if (found == wanted.call.inputs.end())
      return corrupt("the case has no w.", item.key(), ", which the layer needs");
    if (found->second.sizes() != item.value().sizes())
      return corrupt("w.", item.key(), " has shape ", found->second.sizes(), ", the layer's has ",
                     item.value().sizes());
    item.value().copy_(found->second);
    ++used;
  }
  if (used != wanted.call.inputs.size())
    return corrupt("the case has inputs or weights that the layer does not know");
  return mixer;
}

// Runs x in the given pieces, through one state or (no pieces) without any.
OpResult run(const Case& wanted, Mixer& mixer, const std::vector<std::int64_t>& pieces) {
  const at::Tensor x = wanted.call.inputs.at("x").detach().clone().set_requires_grad(true);
  const Sequences sequences{wanted.call.cu_seqlens};
  std::unique_ptr<State> state;
  std::vector<at::Tensor> ys;
  if (pieces.empty()) {
    ys.push_back(mixer.forward(x, sequences, nullptr));
  } else {
    state = mixer.make_state(sequences.count(x.size(0)));
    if (!wanted.call.state.empty()) throw_if_error(state->restore(wanted.call.state));
    std::int64_t begin = 0;
    for (const std::int64_t count : pieces) {
      ys.push_back(mixer.forward(x.narrow(1, begin, count), sequences, state.get()));
      begin += count;
    }
  }
  OpResult result;
  result.out["y"] = at::cat(ys, 1);
  if (state != nullptr) result.state = state->tensors();
  at::Tensor loss;
  for (const auto& [name, grad] : wanted.call.grad_out) {
    const bool of_state = name.starts_with("state.");
    const at::Tensor& value = of_state ? result.state.at(name.substr(6)) : result.out.at(name);
    const at::Tensor term = (value * grad).sum();
    loss = loss.defined() ? loss + term : term;
  }
  if (!loss.defined()) return result;
  mixer.zero_grad();
  loss.backward();
  result.grad["x"] = x.grad();
  for (const auto& item : mixer.named_parameters())
    result.grad["w." + item.key()] = item.value().grad().clone();
  return result;
}

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

}  // namespace

Verdict check_layer(const Case& wanted, const std::string& mechanism, const std::string& kind) {
  const LayerKind* known = nullptr;
  for (const LayerKind& k : kKinds)
    if (mechanism == k.mechanism && kind == k.kind) known = &k;
  if (known == nullptr)
    return {Outcome::kNotApplicable, cat(mechanism, " has no layer of kind \"", kind, "\"")};
  const auto x = wanted.call.inputs.find("x");
  if (x == wanted.call.inputs.end() || x->second.dim() != 3)
    return failed("the case has no in.x of three dimensions");
  auto mixer = make_mixer(wanted, *known);
  if (!mixer.ok()) return failed(mixer.status().message());

  const std::int64_t T = x->second.size(1);
  std::vector<std::vector<std::int64_t>> ways = {{T}};
  const auto split = wanted.call.params.value("split", std::vector<std::int64_t>{});
  if (!split.empty()) ways.push_back(split);
  if (wanted.call.cu_seqlens.empty() && T > 2) ways.push_back({T / 2, 1, T - T / 2 - 1});
  double worst = 0;
  for (const auto& pieces : ways) {
    if (std::accumulate(pieces.begin(), pieces.end(), std::int64_t{0}) != T)
      return failed(cat("params split does not add up to ", T, " tokens"));
    const OpResult result = run(wanted, **mixer, pieces);
    if (const auto why = difference(wanted, result, worst))
      return failed(cat("in ", pieces.size(), " pieces: ", *why));
  }
  std::string forms = cat((*mixer)->path(at::kCPU), " in one pass and in pieces");
  if (wanted.call.state.empty()) {  // and what training calls: no state at all
    Case outputs = wanted;
    outputs.state.clear();
    outputs.grad.clear();
    outputs.call.grad_out.clear();
    if (const auto why = difference(outputs, run(outputs, **mixer, {}), worst))
      return failed(cat("without a state: ", *why));
    forms += ", and without a state";
  }
  Case single = wanted;
  single.call = in_float32(wanted.call);
  (*mixer)->to(at::kFloat);
  double rounding = 0;
  if (const auto why = difference(wanted, run(single, **mixer, ways.back()), rounding,
                                  everywhere(wanted, kLayerFloat32)))
    return failed(cat("in fp32: ", *why));
  return {Outcome::kPassed,
          cat(forms, "; largest error ", worst, "; in fp32 and pieces ", rounding)};
}

}  // namespace everlong::golden
