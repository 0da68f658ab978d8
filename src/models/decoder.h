// A decoder-only language model: embedding, blocks of (mixer, gated MLP), norm, head. Any mix of
// mechanisms.
#pragma once
#include <torch/nn/module.h>

#include <memory>
#include <span>
#include <vector>

#include "layers/mixer.h"
#include "layers/norm.h"
#include "layers/weights.h"
#include "models/config.h"

namespace everlong {

// One State a layer. Value-like through select(); see layers/state.h for the meaning of each call.
class ModelState {
 public:
  explicit ModelState(std::vector<std::unique_ptr<State>> layers) : layers_(std::move(layers)) {}

  std::int64_t sequences() const { return layers_.front()->sequences(); }
  const std::vector<std::int64_t>& positions() const { return layers_.front()->positions(); }
  State& layer(std::size_t index) { return *layers_.at(index); }
  const State& layer(std::size_t index) const { return *layers_.at(index); }
  std::size_t num_layers() const { return layers_.size(); }
  std::int64_t bytes() const;
  std::int64_t bytes_bound(std::int64_t tokens) const;
  ModelState select(std::span<const std::int64_t> sequences) const;
  ModelState clone() const;
  // "layers.<i>.<name>" of every layer, for files and for exact back-propagation through a carried
  // state.
  TensorMap tensors() const;
  // All or nothing: nothing changes unless every layer's tensors fit.
  Status restore(const TensorMap& tensors, const std::vector<std::int64_t>& positions);
  void detach();  // cuts the gradient through what is carried

 private:
  std::vector<std::unique_ptr<State>> layers_;
};

// One layer of the model: a mixer and a gated MLP (or experts), each behind a norm and added to
// what came in.
class Block : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) = 0;
  virtual Mixer& mixer() = 0;
};

// Layer `index` of the model that the config describes, by itself.
Result<std::shared_ptr<Block>> make_block(const ModelConfig& config, std::int64_t index);

class Decoder : public torch::nn::Module {
 public:
  // Fails with a message when a layer refuses its settings. Weights are initialised from torch's
  // global generator, or (kUnfilled, kMeta) cost no memory: a model of any size can be counted.
  static Result<std::shared_ptr<Decoder>> make(const ModelConfig& config,
                                               WeightInit init = WeightInit::kDrawn);

  const ModelConfig& config() const { return config_; }
  std::int64_t parameter_count() const;
  at::Device device() const { return embedding_.device(); }
  ModelState make_state(std::int64_t sequences) const;

  // tokens int64 [B, T], each below vocab_size -> [B, T, D], after the final norm; the state (may
  // be null) moves on by T tokens. Throws a torch error on other dtypes, offsets that do not cover
  // T, or a state for another number of sequences.
  at::Tensor hidden(const at::Tensor& tokens_BT, const Sequences& sequences, ModelState* state);
  at::Tensor logits(const at::Tensor& hidden_BTD);  // [B, T, vocab]
  const at::Tensor& head_weight() const {
    return head_;
  }  // [vocab, D]; the embedding itself when tied

  // Recomputes each block in the backward pass instead of keeping its activations.
  void set_checkpointing(bool on) { checkpointing_ = on; }
  Mixer& mixer(std::int64_t layer) { return blocks_.at(static_cast<std::size_t>(layer))->mixer(); }
  const Mixer& mixer(std::int64_t layer) const {
    return blocks_.at(static_cast<std::size_t>(layer))->mixer();
  }

 private:
  explicit Decoder(const ModelConfig& config) : config_(config) {}
  Status build();
  Status build_megalodon();   // block megalodon: published names without a common root
  Status build_torchscale();  // block torchscale: the same
  ModelConfig config_;
  bool checkpointing_ = false;
  at::Tensor embedding_, head_;
  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<Norm> norm_;
  // Block megalodon: the last norm runs over time, and its state is the last of a ModelState.
  std::shared_ptr<Mixer> time_norm_;
};

}  // namespace everlong
