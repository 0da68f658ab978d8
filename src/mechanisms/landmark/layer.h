// The attention of Landmark Attention's published models (2305.16300): Llama's projections with
// half-split rotation, or GPT's joined projections with interleaved rotation, over blocks that a
// landmark token closes. README.md, sections 2 to 4.
#pragma once
#include "layers/linear.h"
#include "mechanisms/landmark/layer_pages.h"
#include "mechanisms/landmark/op_blocks.h"
#include "mechanisms/mechanism.h"

namespace everlong::landmark {

struct LayerSettings {
  std::int64_t hidden_size = 0, num_layers = 1;
  std::int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1;
  std::string rope = "half_split";  // "interleaved", "none"
  double rope_theta = 10000;
  bool fused = false;           // c_attn and c_proj in the place of q_proj, k_proj, v_proj, o_proj
  std::optional<double> scale;  // default 1 / sqrt(head_dim)
  // Calls without a state see every block of the text, at true positions and wherever the text's
  // landmarks are: how the published models were trained. Else they see what a stream sees.
  bool dense_training = true;
  Retrieval retrieval;
  PageSettings pages;  // where streams keep their blocks, and how sure of them they are
};

// Reads and checks the room's object of config.json.
Result<LayerSettings> read_settings(const LayerSpec& spec);

// Parameters q_proj.weight [H K, D], k_proj.weight and v_proj.weight [G K, D], o_proj.weight [D, H
// K]; or c_attn.weight [3 H K, D] (rows of q, then k, then v) and c_proj.weight [D, H K].
//
// Landmarks lie at positions block - 1 mod block of each sequence, unless Sequences::marks says
// where they are; with a state (or without dense training) marks that say something else are
// refused.
class LandmarkAttention final : public Mixer {
 public:
  explicit LandmarkAttention(const LayerSettings& settings);

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

  // Which blocks calls read from now on; the block length stays. States made before go on.
  Status set_reading(const Retrieval& retrieval);
  const LayerSettings& settings() const { return settings_; }

  // For checks against published code: after forward, the blocks that it picked, int64 [B, T, H,
  // top_k] (retrieval operator, op.h). Off at first; costs memory.
  void record_picks(bool on) { record_ = on; }
  const at::Tensor& picks() const { return picks_; }

 private:
  struct Projected {
    at::Tensor q, k, v;  // [B, T, H, K], [B, T, G, K], not turned
  };
  Projected project(const at::Tensor& x_BTD) const;
  void check(const at::Tensor& x_BTD, const Sequences& sequences, const State* state) const;
  void check_marks(const Sequences& sequences, const at::Tensor& x_BTD, const State* state) const;
  at::Tensor attend_densely(const Projected& x, const Sequences& sequences) const;
  at::Tensor attend_as_streamed(const Projected& x, const Sequences& sequences);

  LayerSettings settings_;
  Reader reader_;
  bool record_ = false;
  at::Tensor picks_;
  std::shared_ptr<Linear> q_proj_, k_proj_, v_proj_, o_proj_, c_attn_;
};

}  // namespace everlong::landmark
