// The layer of torchscale's LongNet models: pre- or post-norm, with Magneto's extra norms (sub-LN,
// 2210.06423) or without, biases everywhere, exact GELU.
//   x += out_proj([inner_attn_ln](dilated(q, k, v)))   of self_attn_layer_norm(x)
//   x += fc2([ffn_layernorm](gelu(fc1(..))))           of final_layer_norm(x)
// Source: microsoft/torchscale 4d1e0e8, torchscale/model/LongNet.py.
#pragma once
#include "layers/affine.h"
#include "mechanisms/longnet/layer.h"
#include "models/decoder.h"

namespace everlong {

struct TorchscaleSettings {
  longnet::LayerSettings attention;  // form torchscale; subln here is that of both parts
  std::int64_t ffn_dim = 0;
  bool normalize_before = true;
};

// Parameters self_attn.{q,k,v,out}_proj, self_attn.inner_attn_ln, self_attn_layer_norm,
// ffn.{fc1,fc2,ffn_layernorm}, final_layer_norm (.weight, .bias).
class TorchscaleLayer final : public Block {
 public:
  explicit TorchscaleLayer(const TorchscaleSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  Mixer& mixer() override { return *self_attn_; }

 private:
  bool normalize_before_;
  std::shared_ptr<longnet::DilatedSelfAttention> self_attn_;
  std::shared_ptr<AffineNorm> attention_norm_, mlp_norm_, inner_norm_;
  std::shared_ptr<AffineLinear> fc1_, fc2_;
};

// Layer `index` of a model with block "torchscale". Its layers are all longnet, form torchscale.
Result<std::shared_ptr<Block>> make_torchscale_block(const ModelConfig& config, std::int64_t index);

}  // namespace everlong
