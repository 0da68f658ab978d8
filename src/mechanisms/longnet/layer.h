// Dilated attention in a block: projections, rotation, and the norm before the output projection
// where the published block has one. Sources: README.md, section 7.
#pragma once
#include "layers/affine.h"
#include "mechanisms/longnet/layer_state.h"
#include "mechanisms/mechanism.h"
#include "ops/rope.h"

namespace everlong::longnet {

struct LayerSettings {
  std::int64_t hidden_size = 0, num_layers = 1;
  // "llama": q_proj, k_proj, v_proj, o_proj without biases. "torchscale": q_proj, k_proj, v_proj,
  // out_proj, biases unless `bias` is false, and inner_attn_ln before out_proj when subln.
  bool torchscale = false;
  bool subln = true, bias = false;
  std::int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1;
  Geometry geometry;
  std::string rope = "half_split";  // "interleaved", "xpos", "none"
  double rope_theta = 10000, xpos_scale_base = 512, norm_eps = 1e-5;
  std::optional<double> scale;  // default 1 / sqrt(head_dim)
};

// Reads and checks the room's object of config.json.
Result<LayerSettings> read_settings(const LayerSpec& spec);

class DilatedSelfAttention final : public Mixer {
 public:
  explicit DilatedSelfAttention(const LayerSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  // Refused for bidirectional attention, which has no past.
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

 private:
  LayerSettings settings_;
  Options options_;
  std::vector<double> frequencies_;
  std::shared_ptr<AffineLinear> q_proj_, k_proj_, v_proj_, out_proj_;
  std::shared_ptr<AffineNorm> inner_norm_;
};

}  // namespace everlong::longnet
