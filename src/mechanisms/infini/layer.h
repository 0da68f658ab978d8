// The Infini-attention layer: Llama's projections, local attention inside segments, a memory of all
// segments before, a trained gate between the two. Source: 2404.07143 section 2; README.md.
#pragma once
#include "layers/gated.h"
#include "layers/linear.h"
#include "layers/write_weighted.h"
#include "mechanisms/infini/layer_state.h"
#include "mechanisms/mechanism.h"

namespace everlong::infini {

struct LayerSettings {
  std::int64_t hidden_size = 0, num_layers = 1;
  std::int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1;
  std::int64_t gates = 1;  // numbers of the gate: 1, num_heads, or num_heads head_dim
  double gate_init = 0;
  Options options;
};

// Reads and checks the room's object of config.json.
Result<LayerSettings> read_settings(const LayerSpec& spec);

// Parameters q_proj.weight [H K, D], k_proj.weight and v_proj.weight [G K, D], o_proj.weight [D, H
// K], and gate [1, H or H K], one dimension (so without weight decay): the weight of memory is its
// sigmoid.
class InfiniAttention final : public Mixer, public Gated, public WriteWeighted {
 public:
  explicit InfiniAttention(const LayerSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

  void set_write_weight(const at::Tensor& weight_BT) override { write_weight_ = weight_BT; }
  at::Tensor gate_values() const override;
  const LayerSettings& settings() const { return settings_; }

 private:
  void check(const at::Tensor& x_BTD, const Sequences& sequences, const State* state) const;
  at::Tensor mix_fresh(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const std::vector<std::int64_t>& offsets) const;

  LayerSettings settings_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_;
  at::Tensor gate_, write_weight_;
};

}  // namespace everlong::infini
