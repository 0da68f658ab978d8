// The parts of a Megalodon block that hold parameters, under their published names and with their
// published initialisation.
#pragma once
#include <mutex>

#include "layers/mixer.h"
#include "mechanisms/megalodon/layer_norm_memory.h"
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {

// A module that only puts its name in front of its parameters'.
struct Named final : torch::nn::Module {
  at::Tensor add(const char* name, const at::Tensor& weight) {
    return register_parameter(name, weight);
  }
};

// y = x W^T (+ b). weight [outputs, inputs] from N(0, 1 / (3 inputs)), what Kaiming's rule gives
// for a slope of sqrt(5); bias 0.
class Projection final : public torch::nn::Module {
 public:
  Projection(std::int64_t inputs, std::int64_t outputs, bool bias);
  at::Tensor forward(const at::Tensor& x) const;
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor weight_, bias_;
};

// Timestep norm with its factor 1 + weight, initially 1: part of a layer, and by itself the norm
// behind the last block, with a state of its own.
class TimestepNorm final : public Mixer {
 public:
  TimestepNorm(std::int64_t width, std::int64_t groups, double eps, const NormWindow& window);
  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override;
  std::unique_ptr<State> make_state(std::int64_t sequences) const override;
  std::string path(at::Device device) const override;

  const at::Tensor& weight() const { return weight_; }
  const at::Tensor& bias() const { return bias_; }
  // By itself: y, with what `memory` holds moved on.
  at::Tensor normalise(const at::Tensor& x_BTD, const Sequences& sequences,
                       const std::vector<std::int64_t>& positions, NormMemory& memory) const {
    return memory.forward(x_BTD, weight_, bias_, eps_, sequences.offsets, positions);
  }
  NormMemory fresh(std::int64_t sequences) const {
    return {sequences, groups_, window_, weight_.device()};
  }

 private:
  std::int64_t groups_;
  double eps_;
  NormWindow window_;
  at::Tensor weight_, bias_;
};

// alpha and delta from N(0, 0.2^2); theta: the logits of frequencies log-uniform between 1/D and 1
// in random order; gamma real from N(0, 1); omega from N(0, 0.25^2) cut at 1.
class MovingAverage final : public torch::nn::Module {
 public:
  MovingAverage(std::int64_t width, std::int64_t modes);
  // With what the CPU kernel makes of them, kept from call to call while no graph is recorded and
  // the weights are the same. Thread safe.
  EmaWeights weights() const;

 private:
  struct Kept {
    // The weights it was made of (held, so that their memory is not reused) and their versions.
    std::vector<std::pair<at::Tensor, std::uint32_t>> made_of;
    at::Tensor planes;
  };
  at::Tensor alpha_, delta_, theta_, gamma_, omega_;
  mutable std::mutex mutex_;
  mutable Kept kept_;
};

// The channel mixer, y = residual + a W_2 (SiLU(W_1 s) [* W_3 s]) with s = LayerNorm(x) (1 + w) +
// b; the residual of a Megalodon block skips two hops: it is the block's input. Parameters
// norm.{weight,bias} (affine), fc1, fc2 and (swiglu) fc3 (.weight), alpha [D] (rescale), initially
// 0.1 * 0.5^layer.
struct FfnSettings {
  std::int64_t width = 1, hidden = 1;
  bool swiglu = true, rescale = false, affine = true;
  double eps = kNormEps;
  std::int64_t layer_index = 0;
};
class NormalizedFfn final : public torch::nn::Module {
 public:
  explicit NormalizedFfn(const FfnSettings& settings);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual) const;

 private:
  FfnSettings settings_;
  at::Tensor norm_weight_, norm_bias_, alpha_;
  std::shared_ptr<Projection> fc1_, fc2_, fc3_;
};

}  // namespace everlong::megalodon
