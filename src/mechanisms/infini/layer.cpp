#include "mechanisms/infini/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/settings.h"
#include "layers/layer_call.h"
#include "layers/weights.h"

namespace everlong::infini {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536;

Rope rope_of(const std::string& name) {
  return name == "none"          ? Rope::kNone
         : name == "interleaved" ? Rope::kInterleaved
                                 : Rope::kHalfSplit;
}

// Sequences of a packed line side by side, each filled up at its end, with copies of its last
// token, to the length of the longest: what follows a sequence changes nothing in it, and nobody
// reads the memory that is left behind.
class SideBySide {
 public:
  explicit SideBySide(const std::vector<std::int64_t>& offsets) {
    for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
      const std::int64_t tokens = offsets[n + 1] - offsets[n];
      sequences_ += tokens > 0 ? 1 : 0;
      longest_ = std::max(longest_, tokens);
    }
    std::int64_t filled = 0;
    for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
      const std::int64_t tokens = offsets[n + 1] - offsets[n];
      if (tokens == 0) continue;
      for (std::int64_t t = 0; t < longest_; ++t) {
        from_.push_back(offsets[n] + std::min(t, tokens - 1));
        if (t < tokens) back_.push_back(filled + t);
      }
      filled += longest_;
    }
  }
  // Rows computed in vain cost more than calls saved where lengths differ much.
  bool pays() const { return sequences_ > 1 && from_.size() <= 2 * back_.size(); }
  // [1, T, ..] -> [N, longest, ..] and back.
  at::Tensor apart(const at::Tensor& x) const {
    if (!x.defined()) return x;
    return pick(x.squeeze(0), from_).unflatten(0, {sequences_, longest_});
  }
  at::Tensor joined(const at::Tensor& x) const { return pick(x.flatten(0, 1), back_).unsqueeze(0); }

 private:
  static at::Tensor pick(const at::Tensor& rows, const std::vector<std::int64_t>& which) {
    const at::Tensor index = at::tensor(which, at::kLong).to(rows.device());
    return rows.index_select(0, index);
  }
  std::int64_t sequences_ = 0, longest_ = 0;
  std::vector<std::int64_t> from_, back_;
};

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
  check_layer_call("infini", x_BTD, settings_.hidden_size, sequences, state,
                   dynamic_cast<const InfiniState*>(state) != nullptr);
  TORCH_CHECK_VALUE(!write_weight_.defined() || write_weight_.sizes() == x_BTD.sizes().slice(0, 2),
                    "infini: write weights of shape ", write_weight_.sizes(), " for tokens ",
                    x_BTD.sizes().slice(0, 2), "; set them for each call, or none");
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
    out = mix_fresh(q, k, v, sequences.offsets);
  }
  return o_proj_->forward(out.flatten(2));
}

// Fresh sequences of a packed line, which nothing outlives.
at::Tensor InfiniAttention::mix_fresh(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const std::vector<std::int64_t>& offsets) const {
  const auto run = [&](const auto& take) {
    return infini_attention(take(q), take(k), take(v), gate_, take(write_weight_), {},
                            settings_.options)
        .out_BTHV;
  };
  const SideBySide rows(offsets);
  if (rows.pays()) return rows.joined(run([&](const at::Tensor& x) { return rows.apart(x); }));
  std::vector<at::Tensor> parts;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n)
    parts.push_back(run([&](const at::Tensor& x) {
      return x.defined() ? x.narrow(1, offsets[n], offsets[n + 1] - offsets[n]) : x;
    }));
  return at::cat(parts, 1);
}

}  // namespace everlong::infini
