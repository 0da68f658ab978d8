// The published Megalodon layer without its residual: timestep norm, complex moving average,
// normalised attention inside chunks, gate (README.md of this room, section 1):
//   u = TimestepNorm(x)     e = CEMA(u)     m = RMSNorm(e)
//   z = W_z m + b_z         v = SiLU(W_v u + b_v)     r = SiLU(W_r m + b_r)
//   y = W_h1 m + b_h1 + W_h2 (ChunkAttention(z, v) * r)
#pragma once
#include "mechanisms/mechanism.h"
#include "mechanisms/megalodon/layer_parts.h"
#include "mechanisms/megalodon/layer_state.h"

namespace everlong::megalodon {

struct LayerSettings {
  std::int64_t hidden_size = 0;
  std::int64_t num_heads = 1, z_dim = 2, value_dim = 1;  // the dims of all heads together
  std::int64_t cema_ndim = 16, norm_num_groups = 1;
  std::int64_t chunk_size = 2048;
  double rope_base = kRopeBase, norm_eps = kNormEps;
  bool norm_affine = true;  // of the RMS norm here and the layer norm of the block
  NormWindow norm_window = {};
  bool moving_average = true;  // false: e = omega u, a control that carries nothing but the norm

  AttentionShape attention() const { return {chunk_size, rope_base, norm_eps}; }
};

// Reads and checks the room's object of config.json. The keys are the published ones.
Result<LayerSettings> read_settings(const LayerSpec& spec);

// Parameters under the published names: timenorm.{weight,bias}, cema.{alpha,delta,theta,gamma,
// omega}, rmsnorm.weight, wv, wz, wr, wh1.{weight,bias}, wh2.weight, gamma, beta.
class GatedAttention final : public Mixer {
 public:
  explicit GatedAttention(const LayerSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

 private:
  // u, e and the average's state, in one pass over the activations where the norm covers the whole
  // text. What `norm` holds moves on.
  NormAveraged carriers(const at::Tensor& x_BTD, const Sequences& sequences,
                        const std::vector<std::int64_t>& positions, NormMemory& norm,
                        const at::Tensor& averages) const;
  LayerState* own_state(const at::Tensor& x_BTD, const Sequences& sequences, State* state) const;

  LayerSettings settings_;
  std::shared_ptr<TimestepNorm> timenorm_;
  std::shared_ptr<MovingAverage> cema_;
  at::Tensor rmsnorm_;  // undefined without affine norms
  std::shared_ptr<Projection> wv_, wz_, wr_, wh1_, wh2_;
  at::Tensor gamma_, beta_;  // [2, z_dim]
};

}  // namespace everlong::megalodon
