#include "mechanisms/softmax/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/settings.h"
#include "layers/layer_call.h"
#include "mechanisms/softmax/layer_cache.h"
#include "mechanisms/softmax/op_cuda.h"
#include "mechanisms/softmax/params.h"

namespace everlong::softmax {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536, kLongestWindow = std::int64_t{1} << 40;

RopePairs pairs_of(const std::string& name) {
  return name == "interleaved" ? RopePairs::kInterleaved : RopePairs::kHalfSplit;
}

}  // namespace

Result<LayerSettings> read_settings(const LayerSpec& spec) {
  Settings s(spec.settings, cat("softmax, layer ", spec.layer_index));
  LayerSettings out;
  out.hidden_size = spec.hidden_size;
  out.num_layers = spec.num_layers;
  out.num_heads =
      s.integer("num_heads", std::max<std::int64_t>(spec.hidden_size / 64, 1), 1, kMostHeads);
  out.num_kv_heads = s.integer("num_kv_heads", out.num_heads, 1, kMostHeads);
  const std::int64_t even_share = spec.hidden_size / out.num_heads;
  out.head_dim = s.integer("head_dim", std::max<std::int64_t>(even_share, 1), 1, kMostDim);
  out.rope = s.choice("rope", "half_split", {"half_split", "interleaved", "none"});
  out.rope_theta = s.number("rope_theta", 10000, 1, 1e30);
  const bool turns = out.rope != "none";
  out.rotary_dim = s.integer("rotary_dim", turns ? out.head_dim / 2 * 2 : 0, 0, out.head_dim);
  out.window = s.integer("window", 0, 0, kLongestWindow);
  if (s.has("scale")) out.scale = s.number("scale", 1, 1e-30, 1e30);
  if (!s.has("head_dim") && spec.hidden_size % out.num_heads != 0)
    s.fail(invalid_argument("hidden_size ", spec.hidden_size, " does not divide among num_heads ",
                            out.num_heads,
                            "; give head_dim, or a number of heads that divides it"));
  if (out.num_heads % out.num_kv_heads != 0)
    s.fail(invalid_argument("num_heads ", out.num_heads, " is not a multiple of num_kv_heads ",
                            out.num_kv_heads,
                            "; query heads share key/value heads in equal groups"));
  if (out.rotary_dim % 2 != 0)
    s.fail(invalid_argument("rotary_dim = ", out.rotary_dim, " is odd; coordinates turn in pairs"));
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return out;
}

Attention::Attention(const LayerSettings& s) : settings_(s) {
  const std::int64_t inner = s.num_heads * s.head_dim, shared = s.num_kv_heads * s.head_dim;
  if (s.rope != "none") frequencies_ = rope_frequencies(s.rope_theta, s.rotary_dim);
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(s.hidden_size, inner));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(s.hidden_size, shared));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(s.hidden_size, shared));
  o_proj_ = register_module(
      "o_proj", std::make_shared<Linear>(inner, s.hidden_size, residual_gain(s.num_layers)));
}

std::unique_ptr<State> Attention::make_state(std::int64_t sequences) const {
  const CacheShape shape{settings_.num_kv_heads, settings_.head_dim, settings_.head_dim,
                         settings_.window};
  return std::make_unique<KvState>(sequences, shape,
                                   k_proj_->weight().options().requires_grad(false));
}

std::string Attention::path(at::Device device) const {
  if (device.is_cuda()) {
    const std::string why = why_not_flash(device, q_proj_->weight().scalar_type(),
                                          settings_.head_dim, settings_.head_dim);
    return why.empty() ? "FlashAttention 2 (ATen)"
                       : cat("composite (ATen); not FlashAttention: ", why);
  }
  if (!device.is_cpu()) return "composite (ATen)";
  const auto options = q_proj_->weight().options().requires_grad(false).device(device);
  const at::Tensor probe = at::empty({1, 0, 1, settings_.head_dim}, options);
  return path_taken(probe, probe, probe, {}) == "cpu" ? "cpu kernel" : "composite (ATen)";
}

at::Tensor Attention::forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) {
  KvState* const own =
      own_state_of<KvState>("softmax", x_BTD, settings_.hidden_size, sequences, state);
  const std::int64_t K = settings_.head_dim;
  at::Tensor q = q_proj_->forward(x_BTD).unflatten(2, {settings_.num_heads, K});
  at::Tensor k = k_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  const at::Tensor v = v_proj_->forward(x_BTD).unflatten(2, {settings_.num_kv_heads, K});
  if (!frequencies_.empty()) {
    const RopeTable table =
        rope_of_call(x_BTD, sequences, own, frequencies_, pairs_of(settings_.rope));
    q = apply_rope(q, table);
    k = apply_rope(k, table);
  }
  const Options options{settings_.window, settings_.scale};
  at::Tensor out;
  if (own != nullptr) {
    out = own->attend(q, k, v, sequences, options);
  } else if (sequences.offsets.empty()) {
    out = attention(q, k, v, options);
  } else {
    out = attention_packed(q, k, v, sequences.offsets, options);
  }
  return o_proj_->forward(out.flatten(2));
}

}  // namespace everlong::softmax
