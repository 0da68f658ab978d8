#include "mechanisms/longnet/layer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/settings.h"
#include "layers/layer_call.h"
#include "layers/linear.h"

namespace everlong::longnet {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536;

// A list of integers >= 1, or the fallback.
std::vector<std::int64_t> read_list(Settings& s, const std::string& key,
                                    const std::vector<std::int64_t>& fallback) {
  const nlohmann::json given = s.raw(key);
  if (given.is_null()) return fallback;
  const bool fits = given.is_array() &&
                    std::ranges::all_of(given, [](const auto& x) { return x.is_number_integer(); });
  if (fits) return given.get<std::vector<std::int64_t>>();
  s.fail(invalid_argument(key, " = ", given.dump(), "; a list of integers is needed, for example ",
                          nlohmann::json(fallback).dump()));
  return fallback;
}

}  // namespace

Result<LayerSettings> read_settings(const LayerSpec& spec) {
  Settings s(spec.settings, cat("longnet, layer ", spec.layer_index));
  LayerSettings out;
  out.hidden_size = spec.hidden_size;
  out.num_layers = spec.num_layers;
  out.torchscale = s.choice("form", "llama", {"llama", "torchscale"}) == "torchscale";
  out.subln = s.boolean("subln", out.torchscale);
  out.bias = s.boolean("bias", out.torchscale);
  out.num_heads =
      s.integer("num_heads", std::max<std::int64_t>(spec.hidden_size / 64, 1), 1, kMostHeads);
  out.num_kv_heads = s.integer("num_kv_heads", out.num_heads, 1, kMostHeads);
  const std::int64_t even_share = spec.hidden_size / out.num_heads;
  out.head_dim = s.integer("head_dim", std::max<std::int64_t>(even_share, 1), 1, kMostDim);
  // The paper's five patterns.
  const auto segments = read_list(s, "segment_length", {2048, 4096, 8192, 16384, 32768});
  const auto ratios = read_list(s, "dilated_ratio", {1, 2, 4, 6, 12});
  Geometry& g = out.geometry;
  g.offset_rule =
      s.choice("offset_rule", out.torchscale ? "block" : "mod", {"mod", "block"}) == "block"
          ? OffsetRule::kBlock
          : OffsetRule::kMod;
  g.beyond =
      s.choice("beyond", "fixed", {"fixed", "grow"}) == "grow" ? Beyond::kGrow : Beyond::kFixed;
  g.causal = s.boolean("causal", true);
  g.phantom = s.choice("pad", "exact", {"exact", "phantom"}) == "phantom" && !g.causal;
  g.detached = s.choice("mixing_grad", "joint", {"joint", "detached"}) == "detached";
  out.rope = s.choice("rope", out.torchscale ? "none" : "half_split",
                      {"half_split", "interleaved", "xpos", "none"});
  out.rope_theta = s.number("rope_theta", 10000, 1, 1e30);
  out.xpos_scale_base = s.number("xpos_scale_base", 512, 1e-3, 1e30);
  out.norm_eps = s.number("norm_eps", 1e-5, 0, 1);
  if (s.has("scale")) out.scale = s.number("scale", 1, 1e-30, 1e30);
  if (!s.has("head_dim") && spec.hidden_size % out.num_heads != 0)
    s.fail(invalid_argument("hidden_size ", spec.hidden_size, " does not divide among num_heads ",
                            out.num_heads,
                            "; give head_dim, or a number of heads that divides it"));
  if (out.num_heads % out.num_kv_heads != 0)
    s.fail(invalid_argument("num_heads ", out.num_heads, " is not a multiple of num_kv_heads ",
                            out.num_kv_heads,
                            "; query heads share key/value heads in equal groups"));
  if (out.rope != "none" && out.head_dim % 2 != 0)
    s.fail(invalid_argument("head_dim = ", out.head_dim,
                            " is odd; coordinates turn in pairs: set rope to none"));
  if (out.subln && !out.torchscale)
    s.fail(invalid_argument("subln is a norm of form \"torchscale\"; form is \"llama\""));
  if (auto patterns = make_patterns(segments, ratios); patterns.ok())
    g.patterns = std::move(patterns).value();
  else
    s.fail(patterns.status());
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(g));
  return out;
}

DilatedSelfAttention::DilatedSelfAttention(const LayerSettings& s)
    : settings_(s),
      options_{.geometry = s.geometry,
               .scale = s.scale,
               .xpos_base = s.rope == "xpos" ? s.xpos_scale_base : 0,
               .path = Path::kAuto} {
  const std::int64_t inner = s.num_heads * s.head_dim, shared = s.num_kv_heads * s.head_dim;
  if (s.rope != "none")
    frequencies_ = rope_frequencies(s.rope == "xpos" ? 10000 : s.rope_theta, s.head_dim);
  // Magneto (2210.06423): values and outputs grow with the depth where their norms hold it.
  const double depth = s.subln ? std::sqrt(std::log(2.0 * static_cast<double>(s.num_layers))) : 1;
  const double narrow = s.torchscale ? 1 / std::sqrt(2.0) : 1;
  const auto project = [&](const char* name, std::int64_t from, std::int64_t to, double gain) {
    return register_module(name, std::make_shared<AffineLinear>(from, to, s.bias, gain));
  };
  q_proj_ = project("q_proj", s.hidden_size, inner, narrow);
  k_proj_ = project("k_proj", s.hidden_size, shared, narrow);
  v_proj_ = project("v_proj", s.hidden_size, shared, narrow * depth);
  if (s.subln)
    inner_norm_ = register_module("inner_attn_ln", std::make_shared<AffineNorm>(inner, s.norm_eps));
  out_proj_ = project(s.torchscale ? "out_proj" : "o_proj", inner, s.hidden_size,
                      s.torchscale ? depth : residual_gain(s.num_layers));
}

std::unique_ptr<State> DilatedSelfAttention::make_state(std::int64_t sequences) const {
  TORCH_CHECK_VALUE(settings_.geometry.causal,
                    "longnet: bidirectional attention carries no state; give it whole sequences, "
                    "or set causal to true");
  const StateShape shape{settings_.geometry, settings_.num_kv_heads, settings_.head_dim,
                         settings_.head_dim};
  return std::make_unique<LatticeState>(sequences, shape,
                                        k_proj_->weight().options().requires_grad(false));
}

std::string DilatedSelfAttention::path(at::Device device) const {
  const auto options = q_proj_->weight().options().requires_grad(false).device(device);
  if (!device.is_cpu()) return "composite (ATen)";
  const at::Tensor probe = at::empty({1, 0, 1, settings_.head_dim}, options);
  return path_taken(probe, probe, probe, options_) == "cpu" ? "cpu kernel" : "composite (ATen)";
}

at::Tensor DilatedSelfAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                         State* state) {
  LatticeState* const own =
      own_state_of<LatticeState>("longnet", x_BTD, settings_.hidden_size, sequences, state);
  const std::int64_t K = settings_.head_dim;
  at::Tensor q = q_proj_->forward(x_BTD).unflatten(2, {settings_.num_heads, K});
  at::Tensor k = k_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  const at::Tensor v = v_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  if (!frequencies_.empty()) {
    const RopePairs pairs =
        settings_.rope == "half_split" ? RopePairs::kHalfSplit : RopePairs::kInterleaved;
    const RopeTable table = rope_of_call(x_BTD, sequences, own, frequencies_, pairs);
    q = apply_rope(q, table);
    k = apply_rope(k, table);
  }
  at::Tensor out;
  if (own != nullptr) {
    out = own->attend(q, k, v, sequences, options_);
  } else if (sequences.offsets.empty()) {
    out = attention(q, k, v, options_);
  } else {
    out = attention_packed(q, k, v, sequences.offsets, options_);
  }
  out = out.flatten(2);
  if (inner_norm_ != nullptr) out = inner_norm_->forward(out);
  return out_proj_->forward(out);
}

}  // namespace everlong::longnet
