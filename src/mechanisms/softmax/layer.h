// Llama's attention: projections, rotary embedding, grouped heads, an optional sliding window.
// Source: the published Llama model code (equations in README.md, section 1); windows as Mistral 7B
// (2310.06825) section 2.
#pragma once
#include "layers/linear.h"
#include "mechanisms/mechanism.h"
#include "mechanisms/softmax/op.h"
#include "ops/rope.h"

namespace everlong::softmax {

struct LayerSettings {
  std::int64_t hidden_size = 0, num_layers = 1;
  std::int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1;
  std::string rope = "half_split";  // "interleaved", "none"
  double rope_theta = 10000;
  std::int64_t rotary_dim = 0;  // leading coordinates of a head that turn, even
  std::int64_t window = 0;
  std::optional<double> scale;  // default 1 / sqrt(head_dim)
};

// Reads and checks the room's object of config.json.
Result<LayerSettings> read_settings(const LayerSpec& spec);

// Parameters q_proj.weight [H K, D], k_proj.weight and v_proj.weight [G K, D], o_proj.weight [D, H
// K].
class Attention final : public Mixer {
 public:
  explicit Attention(const LayerSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

 private:
  LayerSettings settings_;
  std::vector<double> frequencies_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_;
};

}  // namespace everlong::softmax
