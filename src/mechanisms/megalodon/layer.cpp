#include "mechanisms/megalodon/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/settings.h"
#include "layers/layer_call.h"
#include "layers/weights.h"
#include "ops/rms_norm.h"

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 20, kLongestChunk = std::int64_t{1} << 40,
                       kMostWindow = 4096;

}  // namespace

// The published sizes grow with the width: keys of D / 4 and values of 2 D, heads of 256 keys, norm
// groups of 32 channels.
Result<LayerSettings> read_settings(const LayerSpec& spec) {
  Settings s(spec.settings, cat("megalodon, layer ", spec.layer_index));
  LayerSettings out;
  const std::int64_t D = out.hidden_size = spec.hidden_size;
  const auto at_least = [](std::int64_t low, std::int64_t value) { return std::max(low, value); };
  out.num_heads = s.integer("num_heads", at_least(1, D / 1024), 1, 65536);
  out.z_dim = s.integer("z_dim", at_least(2 * out.num_heads, D / 4), 1, kMost);
  out.value_dim = s.integer("value_dim", 2 * D, 1, kMost);
  out.cema_ndim = s.integer("cema_ndim", 16, 1, kMostModes);
  out.norm_num_groups = s.integer("norm_num_groups", D % 32 == 0 ? D / 32 : 1, 1, kMost);
  out.chunk_size = s.integer("chunk_size", 2048, 1, kLongestChunk);
  out.rope_base = s.number("rope_base", kRopeBase, 1, 1e30);
  out.norm_eps = s.number("norm_eps", spec.norm_eps, 0, 1);
  out.norm_affine = s.boolean("norm_affine", true);
  const std::int64_t window = s.integer("norm_window", 0, 0, kMostWindow);
  if (window % 2 != 0)
    s.fail(invalid_argument("norm_window = ", window,
                            " chunks; an even number is needed, because statistics leave by two "
                            "chunks at a time, or 0: they cover the whole text"));
  out.norm_window = {2 * out.chunk_size, window / 2};
  out.moving_average = s.choice("moving_average", "on", {"on", "off"}) == "on";
  for (const auto& [key, dim] :
       {std::pair{"z_dim", out.z_dim}, std::pair{"value_dim", out.value_dim}})
    if (dim % out.num_heads != 0)
      s.fail(invalid_argument(key, " = ", dim, " does not divide among num_heads ", out.num_heads,
                              "; give a multiple"));
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(check_norm(D, out.norm_num_groups, out.norm_eps));
  EVERLONG_RETURN_IF_ERROR(check_ema(D, out.cema_ndim));
  EVERLONG_RETURN_IF_ERROR(check_attention(out.num_heads, out.z_dim / out.num_heads,
                                           out.value_dim / out.num_heads, out.chunk_size,
                                           out.rope_base, out.norm_eps));
  return out;
}

GatedAttention::GatedAttention(const LayerSettings& s) : settings_(s) {
  const std::int64_t D = s.hidden_size;
  timenorm_ = register_module(
      "timenorm", std::make_shared<TimestepNorm>(D, s.norm_num_groups, s.norm_eps, s.norm_window));
  cema_ = register_module("cema", std::make_shared<MovingAverage>(D, s.cema_ndim));
  if (s.norm_affine)
    rmsnorm_ = register_module("rmsnorm", std::make_shared<Named>())
                   ->add("weight", constant_weight({D}, 0));
  wv_ = register_module("wv", std::make_shared<Projection>(D, s.value_dim, true));
  wz_ = register_module("wz", std::make_shared<Projection>(D, s.z_dim, true));
  wr_ = register_module("wr", std::make_shared<Projection>(D, s.value_dim, true));
  wh1_ = register_module("wh1", std::make_shared<Projection>(D, D, true));
  wh2_ = register_module("wh2", std::make_shared<Projection>(s.value_dim, D, false));
  gamma_ = register_parameter("gamma", constant_weight({2, s.z_dim}, 0));
  beta_ = register_parameter("beta", constant_weight({2, s.z_dim}, 0));
}

std::unique_ptr<State> GatedAttention::make_state(std::int64_t sequences) const {
  const LayerSettings& s = settings_;
  const LayerStateShape shape{s.hidden_size, s.norm_num_groups,     s.cema_ndim,
                              s.num_heads,   s.z_dim / s.num_heads, s.value_dim / s.num_heads,
                              s.chunk_size,  s.norm_window};
  return std::make_unique<LayerState>(sequences, shape,
                                      wz_->weight().options().requires_grad(false));
}

std::string GatedAttention::path(at::Device device) const { return timenorm_->path(device); }

LayerState* GatedAttention::own_state(const at::Tensor& x_BTD, const Sequences& sequences,
                                      State* state) const {
  return own_state_of<LayerState>("megalodon", x_BTD, settings_.hidden_size, sequences, state);
}

NormAveraged GatedAttention::carriers(const at::Tensor& x_BTD, const Sequences& sequences,
                                      const std::vector<std::int64_t>& positions, NormMemory& norm,
                                      const at::Tensor& averages) const {
  const EmaWeights weights = cema_->weights();
  NormAveraged out;
  if (settings_.moving_average && !settings_.norm_window.bounded()) {
    out = norm_cema(x_BTD, timenorm_->weight(), timenorm_->bias(), settings_.norm_eps, weights,
                    sequences.offsets, norm.state(positions), averages);
    norm.set(out.norm);
    return out;
  }
  out.u_BTD = timenorm_->normalise(x_BTD, sequences, positions, norm);
  if (settings_.moving_average) {
    Averaged e = cema(out.u_BTD, weights, sequences.offsets, averages);
    out.e_BTD = std::move(e.y_BTD);
    out.h_NDM2 = std::move(e.h_NDM2);
  } else {
    out.e_BTD = out.u_BTD * weights.omega_D1.flatten().to(out.u_BTD.scalar_type());
    out.h_NDM2 = averages;
  }
  return out;
}

at::Tensor GatedAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                   State* state) {
  const LayerSettings& s = settings_;
  LayerState* own = own_state(x_BTD, sequences, state);
  const std::int64_t count = sequences.count(x_BTD.size(0));
  NormMemory norm = own != nullptr ? own->norm() : timenorm_->fresh(count);
  std::vector<std::int64_t> positions(static_cast<std::size_t>(count));
  if (own != nullptr) positions = own->positions();
  NormAveraged ue =
      carriers(x_BTD, sequences, positions, norm, own != nullptr ? own->averages() : at::Tensor());
  const at::Tensor m = rms_norm(ue.e_BTD, rmsnorm_.defined() ? rmsnorm_ + 1 : rmsnorm_, s.norm_eps);
  const at::Tensor v = at::silu(wv_->forward(ue.u_BTD)),
                   z = wz_->forward(m).unflatten(2, {s.num_heads, s.z_dim / s.num_heads}),
                   r = at::silu(wr_->forward(m));
  const at::Tensor values = v.unflatten(2, {s.num_heads, s.value_dim / s.num_heads});
  at::Tensor o;
  if (own == nullptr) {
    o = chunk_attention(z, values, gamma_, beta_, s.attention(), sequences.offsets,
                        empty_cache(count, z, values))
            .o_BTHV;
  } else {
    ChunkCache cache = own->cache();
    if (at::GradMode::is_enabled()) {
      Attended out =
          chunk_attention(z, values, gamma_, beta_, s.attention(), sequences.offsets, cache);
      o = std::move(out.o_BTHV);
      cache = std::move(out.cache);
    } else {
      o = chunk_attention_appending(z, values, gamma_, beta_, s.attention(), sequences.offsets,
                                    cache, own->shared());
    }
    own->set(std::move(norm), moved_positions(positions, sequences, x_BTD.size(1)),
             std::move(ue.h_NDM2), std::move(cache));
  }
  return wh1_->forward(m) + wh2_->forward(o.flatten(2) * r);
}

}  // namespace everlong::megalodon
