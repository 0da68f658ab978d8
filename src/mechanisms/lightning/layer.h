// GLA, the token mixer of TransNormerLLM (2307.14995 section 3.4; published code:
// NormLinearAttention):
//   [q|k|v|u] = x W_qkvu^T in four blocks, heads contiguous in each;  q, k <- act(q), act(k)
//   with LRPE:  q <- [q cos(t theta), q sin(t theta)], k likewise, t the absolute position: the key
//   dim doubles o = decay_linear_attention(q, k, v, slopes of the layer, scale 1) y = (u *
//   SRMSNorm(o over all heads)) W_out^T
#pragma once
#include <memory>
#include <string>

#include "layers/linear.h"
#include "layers/mixer.h"
#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/params.h"
#include "mechanisms/mechanism.h"

namespace everlong::lightning {

enum class Activation { kSilu, kNone };
enum class LrpeLayers { kNone, kFirst, kAll };

struct LayerSettings {
  std::int64_t num_heads = 1;
  std::int64_t head_dim = 64;  // num_heads * head_dim need not be the hidden size
  SlopeRule slope_rule = SlopeRule::kAlibiLayer;
  Activation activation = Activation::kSilu;
  LrpeLayers lrpe = LrpeLayers::kNone;
  double norm_eps = 1e-6;

  // Defaults that depend on the width: heads of 64 where that divides it, else one head; head_dim =
  // width / num_heads.
  static Result<LayerSettings> read(const LayerSpec& spec);
};

// S [N, H, K, V] and the positions. Its size never changes.
class LightningState final : public State {
 public:
  explicit LightningState(at::Tensor S_NHKV) : State(S_NHKV.size(0)), S_(std::move(S_NHKV)) {}

  const at::Tensor& matrices() const { return S_; }
  void set_matrices(at::Tensor S_NHKV) { S_ = std::move(S_NHKV); }

  TensorMap tensors() const override { return {{"S", S_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 private:
  at::Tensor S_;  // fp32; fp64 under fp64 weights
};

// Learnable rotation of q and k by angles t * theta. Parameter "theta" [H, 1, D], initially
// theta_{h,i} = 10000^(-2(h D + i)/(H D)).
class Lrpe final : public torch::nn::Module {
 public:
  Lrpe(std::int64_t heads, std::int64_t head_dim);
  // x [B, T, Z, H, D], positions int64 [B or 1, T] -> [B, T, Z, H, 2D]. Angles are reduced in fp64:
  // good to fp32 rounding up to position 2^30.
  at::Tensor forward(const at::Tensor& x_BTZHD, const at::Tensor& positions_BT) const;

 private:
  at::Tensor theta_;
};

class GatedLinearAttention final : public Mixer {
 public:
  static Result<std::shared_ptr<Mixer>> make(const LayerSpec& spec);
  GatedLinearAttention(const LayerSpec& spec, const LayerSettings& settings,
                       std::vector<double> slope);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

 private:
  std::int64_t key_dim() const { return settings_.head_dim * (lrpe_ == nullptr ? 1 : 2); }

  LayerSettings settings_;
  Decay decay_;
  std::shared_ptr<Linear> qkvu_proj_, out_proj_;
  std::shared_ptr<Lrpe> lrpe_;  // null: none
};

}  // namespace everlong::lightning
