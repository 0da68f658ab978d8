#include "mechanisms/infini/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/offsets.h"
#include "core/settings.h"
#include "layers/weights.h"

namespace everlong::infini {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536;

Rope rope_of(const std::string& name) {
  return name == "none"          ? Rope::kNone
         : name == "interleaved" ? Rope::kInterleaved
                                 : Rope::kHalfSplit;
}

}  // namespace

Result<LayerSettings> read_settings(const LayerSpec& spec) {
  Settings s(spec.settings, cat("infini, layer ", spec.layer_index));
  LayerSettings out;
  out.hidden_size = spec.hidden_size;
  out.num_layers = spec.num_layers;
  out.num_heads =
      s.integer("num_heads", std::max<std::int64_t>(spec.hidden_size / 64, 1), 1, kMostHeads);
  out.num_kv_heads = s.integer("num_kv_heads", out.num_heads, 1, kMostHeads);
  const std::int64_t even_share = spec.hidden_size / out.num_heads;
  out.head_dim = s.integer("head_dim", std::max<std::int64_t>(even_share, 1), 1, kMostDim);
  if (!s.has("head_dim") && spec.hidden_size % out.num_heads != 0)
    s.fail(invalid_argument("hidden_size ", spec.hidden_size, " does not divide among num_heads ",
                            out.num_heads,
                            "; give head_dim, or a number of heads that divides it"));
  if (out.num_heads % out.num_kv_heads != 0)
    s.fail(invalid_argument("num_heads ", out.num_heads, " is not a multiple of num_kv_heads ",
                            out.num_kv_heads,
                            "; query heads share key/value heads in equal groups"));
  Options& o = out.options;
  o.segment = s.integer("segment", 2048, 1, std::int64_t{1} << 30);
  read_common(s, o);
  o.rope = rope_of(s.choice("rope", "half_split", {"half_split", "interleaved", "none"}));
  if (s.has("scale")) o.scale = s.number("scale", 1, 1e-30, 1e30);
  o.gate = s.choice("gate", "sigmoid", {"sigmoid", "hard_sigmoid"}) == "hard_sigmoid"
               ? Gate::kHardSigmoid
               : Gate::kSigmoid;
  const std::string granularity =
      s.choice("gate_granularity", "head", {"head", "layer", "channel"});
  out.gates = granularity == "layer"     ? 1
              : granularity == "channel" ? out.num_heads * out.head_dim
                                         : out.num_heads;
  o.read = s.choice("memory", "on", {"on", "off"}) == "on";
  // Beyond it the slope of the sigmoid is below 5e-5 and the gate cannot learn: published code
  // starts at 10 and at -100.
  out.gate_init = s.number("gate_init", 0, -9, 9);
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(o, out.head_dim).at(cat("infini, layer ", spec.layer_index)));
  return out;
}

InfiniAttention::InfiniAttention(const LayerSettings& s) : settings_(s) {
  const std::int64_t inner = s.num_heads * s.head_dim, shared = s.num_kv_heads * s.head_dim;
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(s.hidden_size, inner));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(s.hidden_size, shared));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(s.hidden_size, shared));
  o_proj_ = register_module(
      "o_proj", std::make_shared<Linear>(inner, s.hidden_size, residual_gain(s.num_layers)));
  gate_ = register_parameter("gate", constant_weight({s.gates}, s.gate_init));
}

std::unique_ptr<State> InfiniAttention::make_state(std::int64_t sequences) const {
  const StateShape shape{settings_.num_kv_heads, settings_.head_dim, settings_.head_dim};
  return std::make_unique<InfiniState>(sequences, shape, settings_.options,
                                       q_proj_->weight().options().requires_grad(false));
}

std::string InfiniAttention::path(at::Device device) const {
  if (!device.is_cpu()) return "composite (ATen)";
  const auto options = q_proj_->weight().options().requires_grad(false).device(device);
  const at::Tensor probe = at::empty({1, 0, 1, settings_.head_dim}, options);
  if (path_taken(probe, probe, probe) != "cpu") return "composite (ATen)";
  return settings_.options.update == Update::kLinear ? "cpu kernel"
                                                     : "cpu kernel (delta writes: ATen)";
}

at::Tensor InfiniAttention::gate_values() const {
  const at::NoGradGuard constant;
  return gate_of(gate_, settings_.num_heads, settings_.options, at::kFloat).flatten();
}

void InfiniAttention::check(const at::Tensor& x_BTD, const Sequences& sequences,
                            const State* state) const {
  TORCH_CHECK_VALUE(x_BTD.dim() == 3 && x_BTD.size(2) == settings_.hidden_size && x_BTD.size(0) > 0,
                    "infini: x has shape ", x_BTD.sizes(), "; [B, T, ", settings_.hidden_size,
                    "] is needed");
  throw_if_error(check_offsets(sequences.offsets, x_BTD.size(0), x_BTD.size(1)).at("infini"));
  TORCH_CHECK_VALUE(!write_weight_.defined() || write_weight_.sizes() == x_BTD.sizes().slice(0, 2),
                    "infini: write weights of shape ", write_weight_.sizes(), " for tokens ",
                    x_BTD.sizes().slice(0, 2), "; set them for each call, or none");
  if (state == nullptr) return;
  TORCH_CHECK_VALUE(
      dynamic_cast<const InfiniState*>(state) != nullptr,
      "infini: the state is of another mechanism; take it from this layer's make_state");
  TORCH_CHECK_VALUE(state->sequences() == sequences.count(x_BTD.size(0)), "infini: a state of ",
                    state->sequences(), " sequences for a call of ",
                    sequences.count(x_BTD.size(0)));
}

at::Tensor InfiniAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                    State* state) {
  check(x_BTD, sequences, state);
  const std::int64_t K = settings_.head_dim;
  const at::Tensor q = q_proj_->forward(x_BTD).unflatten(2, {settings_.num_heads, K});
  const at::Tensor k = k_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  const at::Tensor v = v_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  at::Tensor out;
  if (state != nullptr) {
    out = static_cast<InfiniState*>(state)->mix(q, k, v, gate_, write_weight_, sequences);
  } else if (sequences.offsets.empty()) {
    out = infini_attention(q, k, v, gate_, write_weight_, {}, settings_.options).out_BTHV;
  } else {
    std::vector<at::Tensor> parts;
    for (std::size_t n = 0; n + 1 < sequences.offsets.size(); ++n) {
      const std::int64_t begin = sequences.offsets[n], count = sequences.offsets[n + 1] - begin;
      const auto mine = [&](const at::Tensor& x) {
        return x.defined() ? x.narrow(1, begin, count) : x;
      };
      parts.push_back(infini_attention(mine(q), mine(k), mine(v), gate_, mine(write_weight_), {},
                                       settings_.options)
                          .out_BTHV);
    }
    out = at::cat(parts, 1);
  }
  return o_proj_->forward(out.flatten(2));
}

}  // namespace everlong::infini
