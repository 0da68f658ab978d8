#include <ATen/ATen.h>

#include <algorithm>

#include "mechanisms/lightning/layer.h"

namespace everlong::lightning {
namespace {

// The absolute position of every token: [1, T] where all rows are at the same place (then one row
// serves all).
at::Tensor positions_of(const Sequences& sequences, const State* state, std::int64_t batch,
                        std::int64_t tokens, at::Device device) {
  const std::int64_t count = sequences.count(batch);
  const auto start = [&](std::int64_t n) {
    return state == nullptr ? 0 : state->positions()[static_cast<std::size_t>(n)];
  };
  if (sequences.offsets.empty()) {
    std::vector<std::int64_t> starts;
    for (std::int64_t n = 0; n < count; ++n) starts.push_back(start(n));
    if (std::ranges::all_of(starts, [&](auto s) { return s == starts.front(); })) starts.resize(1);
    return at::tensor(starts, at::kLong).to(device).unsqueeze(1) +
           at::arange(tokens, at::device(device).dtype(at::kLong));
  }
  std::vector<std::int64_t> positions;
  for (std::int64_t n = 0; n < count; ++n)
    for (std::int64_t t = 0; t < sequences.length(n, tokens); ++t)
      positions.push_back(start(n) + t);
  return at::tensor(positions, at::kLong).to(device).unsqueeze(0);
}

}  // namespace

GatedLinearAttention::GatedLinearAttention(const LayerSpec& spec, const LayerSettings& settings,
                                           std::vector<double> slope)
    : LightningLayer(settings, std::move(slope)),
      qkvu_proj_(register_module(
          "qkvu_proj",
          std::make_shared<Linear>(spec.hidden_size, 4 * settings.num_heads * settings.head_dim))) {
  add_out_proj(spec);
  if (settings.lrpe)
    lrpe_ = register_module("lrpe", std::make_shared<Lrpe>(settings.num_heads, settings.head_dim));
}

at::Tensor GatedLinearAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                         State* state) {
  const std::int64_t B = x_BTD.size(0), T = x_BTD.size(1), H = settings_.num_heads,
                     D = settings_.head_dim;
  LightningState* const own = own_state(x_BTD, sequences, state);
  // Split, not sliced: the gradient is then put together once, where each slice would bring a
  // zero-filled whole.
  const auto qk_v_u =
      qkvu_proj_->forward(x_BTD).view({B, T, 4, H, D}).split_with_sizes({2, 1, 1}, 2);
  at::Tensor qk = qk_v_u[0];
  Fusion fusion;
  if (settings_.activation == Activation::kSilu) {
    // On a GPU the kernel does it on the way, where no rotation comes in between.
    fusion.silu_q = fusion.silu_k = qk.is_cuda() && lrpe_ == nullptr;
    qk = silu_where(!fusion.silu_q, qk);
  }
  if (lrpe_ != nullptr) qk = lrpe_->forward(qk, positions_of(sequences, own, B, T, x_BTD.device()));
  const auto q_k = qk.unbind(2);
  const at::Tensor o = attend(q_k[0], q_k[1], qk_v_u[1].squeeze(2), sequences, own, fusion);
  return out_proj_->forward(qk_v_u[2].reshape({B, T, H * D}) *
                            simple_rms_norm(o, settings_.norm_eps));
}

}  // namespace everlong::lightning
