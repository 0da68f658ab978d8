#include <ATen/ATen.h>

#include "mechanisms/lightning/layer.h"

namespace everlong::lightning {

MinimaxAttention::MinimaxAttention(const LayerSpec& spec, const LayerSettings& settings,
                                   std::vector<double> slope)
    : LightningLayer(settings, std::move(slope)) {
  const std::int64_t width = settings.num_heads * settings.head_dim;
  qkv_proj_ = register_module("qkv_proj", std::make_shared<Linear>(spec.hidden_size, 3 * width));
  output_gate_ = register_module("output_gate", std::make_shared<Linear>(spec.hidden_size, width));
  add_out_proj(spec);
  norm_ = register_module("norm", make_norm("rms", width, settings.norm_eps).value());
}

at::Tensor MinimaxAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                     State* state) {
  LightningState* const own = own_state(x_BTD, sequences, state);
  at::Tensor qkv = qkv_proj_->forward(x_BTD);
  Fusion fusion;
  if (settings_.activation == Activation::kSilu) {
    fusion.silu_q = fusion.silu_k = fusion.silu_v = qkv.is_cuda();  // by the kernel, on the way
    qkv = silu_where(!fusion.silu_q, qkv);
  }
  // The packing is per head, so q, k and v are strided views; the operator takes any strides.
  const auto parts = qkv.unflatten(2, {settings_.num_heads, 3 * settings_.head_dim}).chunk(3, -1);
  const at::Tensor o = attend(parts[0], parts[1], parts[2], sequences, own, fusion);
  return out_proj_->forward(at::sigmoid(output_gate_->forward(x_BTD)) * norm_->forward(o));
}

}  // namespace everlong::lightning
