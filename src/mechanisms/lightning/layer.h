// The published layers around decayed linear attention, o = decay_linear_attention(q, k, v, slopes
// of the layer, scale 1). Settings key "form":
//
// "transnormer": GLA, the token mixer of TransNormerLLM (2307.14995 section 3.4; published code:
// NormLinearAttention):
//   [q|k|v|u] = x W_qkvu^T in four blocks, heads contiguous in each;  q, k <- act(q), act(k)
//   with LRPE:  q <- [q cos(t theta), q sin(t theta)], k likewise, t the absolute position: the key
//   dim doubles
//   y = (u * SRMSNorm(o over all heads)) W_out^T
//
// "minimax": the lightning layer of MiniMax-01 (2501.08313 section 2.2; published code:
// MiniMaxLightningAttention):
//   a = act(x W_qkv^T);  head h owns columns [3 h D, 3 (h+1) D) of a: its q, then k, then v
//   y = (sigmoid(x W_gate^T) * RMSNorm(o over all heads, with a weight)) W_out^T
#pragma once
#include <memory>
#include <string>

#include "layers/linear.h"
#include "layers/mixer.h"
#include "layers/norm.h"
#include "mechanisms/lightning/layer_state.h"
#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/params.h"
#include "mechanisms/mechanism.h"

namespace everlong::lightning {

enum class Form { kTransnormer, kMinimax };
enum class Activation { kSilu, kNone };

struct LayerSettings {
  Form form = Form::kTransnormer;
  std::int64_t num_heads = 1;
  std::int64_t head_dim = 64;  // num_heads * head_dim need not be the hidden size
  SlopeRule slope_rule = SlopeRule::kAlibiLayer;
  Activation activation = Activation::kSilu;
  bool lrpe = false;  // in this layer; the key says which: "none", "first_layer", "all", or a list
                      // with 0 or 1 for each layer of the model. Form transnormer only
  double norm_eps = 1e-6;  // of the norm over all heads; form minimax: 1e-6 whatever the model's is
  // "auto", "on" or "off": whether single tokens on a GPU wait in rings before they enter S. "on"
  // does so at any size. A matter of time alone: the numbers agree to rounding.
  WriteBehind write_behind = WriteBehind::kAuto;

  std::int64_t key_dim() const { return head_dim * (lrpe ? 2 : 1); }

  // Defaults that depend on the width: heads of 64 where that divides it, else one head; head_dim =
  // width / num_heads.
  static Result<LayerSettings> read(const LayerSpec& spec);
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

// The layer that the settings' form names.
Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec);

// What the forms share: the state, and the operator between their projections.
class LightningLayer : public Mixer {
 public:
  std::unique_ptr<State> make_state(std::int64_t sequences) const final;
  std::string path(at::Device device) const final;

 protected:
  LightningLayer(const LayerSettings& settings, std::vector<double> slope);
  void add_out_proj(const LayerSpec& spec);

  // The state as this room's, after checks; null stays null.
  LightningState* own_state(const at::Tensor& x_BTD, const Sequences& sequences,
                            State* state) const;
  // o [B, T, H D], all heads side by side, of silu(q) where the fusion says so. Moves the state on.
  at::Tensor attend(at::Tensor q_BTHK, at::Tensor k_BTHK, at::Tensor v_BTHV,
                    const Sequences& sequences, LightningState* state, Fusion fusion = {}) const;

  LayerSettings settings_;
  Decay decay_;
  std::shared_ptr<Linear> out_proj_;
};

class GatedLinearAttention final : public LightningLayer {
 public:
  GatedLinearAttention(const LayerSpec& spec, const LayerSettings& settings,
                       std::vector<double> slope);
  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;

 private:
  std::shared_ptr<Linear> qkvu_proj_;
  std::shared_ptr<Lrpe> lrpe_;  // null: none
};

class MinimaxAttention final : public LightningLayer {
 public:
  MinimaxAttention(const LayerSpec& spec, const LayerSettings& settings, std::vector<double> slope);
  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;

 private:
  std::shared_ptr<Linear> qkv_proj_, output_gate_;
  std::shared_ptr<Norm> norm_;
};

}  // namespace everlong::lightning
