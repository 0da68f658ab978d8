#include "mechanisms/megalodon/layer_parts.h"

#include <ATen/ATen.h>

#include <cmath>

#include "layers/weights.h"
#include "mechanisms/megalodon/layer_state.h"

namespace everlong::megalodon {
namespace {

// Frequencies e^(-i ln D / D) for i = 1..D as logits, in random order. The last is 1 / D; a width
// of 1 would give 1, which has no logit.
at::Tensor drawn_theta(std::int64_t width) {
  const auto D = static_cast<double>(width);
  const at::Tensor index = at::randperm(width, at::kLong).to(at::kDouble) + 1;
  const at::Tensor share = (index * (-std::log(D) / D)).exp().clamp(1e-6, 1 - 1e-6);
  return at::logit(share).to(at::kFloat).view({width, 1, 1});
}

at::Tensor drawn_gamma(std::int64_t width, std::int64_t modes) {
  at::Tensor gamma = at::zeros({width, modes, 2});
  gamma.select(2, 0).normal_();
  return gamma;
}

}  // namespace

Projection::Projection(std::int64_t inputs, std::int64_t outputs, bool bias) {
  const double deviation = 1 / std::sqrt(3 * static_cast<double>(inputs));
  weight_ = register_parameter("weight", normal_weight({outputs, inputs}, deviation));
  if (bias) bias_ = register_parameter("bias", constant_weight({outputs}, 0));
}

at::Tensor Projection::forward(const at::Tensor& x) const {
  return bias_.defined() ? at::linear(x, weight_, bias_) : at::linear(x, weight_);
}

TimestepNorm::TimestepNorm(std::int64_t width, std::int64_t groups, double eps,
                           const NormWindow& window)
    : groups_(groups),
      eps_(eps),
      window_(window),
      weight_(register_parameter("weight", constant_weight({width}, 0))),
      bias_(register_parameter("bias", constant_weight({width}, 0))) {}

at::Tensor TimestepNorm::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                 State* state) {
  auto* own = dynamic_cast<NormOnlyState*>(state);
  TORCH_CHECK_VALUE(state == nullptr || own != nullptr,
                    "megalodon: the state is not of a timestep norm");
  const std::int64_t count = sequences.count(x_BTD.size(0));
  NormMemory memory = own != nullptr ? own->memory() : fresh(count);
  std::vector<std::int64_t> positions(static_cast<std::size_t>(count));
  if (own != nullptr) positions = own->positions();
  at::Tensor y = normalise(x_BTD, sequences, positions, memory);
  if (own != nullptr)
    own->set(std::move(memory), moved_positions(positions, sequences, x_BTD.size(1)));
  return y;
}

std::unique_ptr<State> TimestepNorm::make_state(std::int64_t sequences) const {
  return std::make_unique<NormOnlyState>(sequences, groups_, window_, weight_.device());
}

std::string TimestepNorm::path(at::Device device) const {
  const at::Tensor probe = at::empty({1, 0, weight_.size(0)}, weight_.options().device(device));
  return path_taken(probe) == "cpu" ? "cpu kernel" : "composite (ATen)";
}

MovingAverage::MovingAverage(std::int64_t width, std::int64_t modes)
    : alpha_(register_parameter("alpha", normal_weight({width, modes, 1}, 0.2))),
      delta_(register_parameter("delta", normal_weight({width, modes, 1}, 0.2))),
      theta_(register_parameter("theta", weight_from(drawn_theta(width)))),
      gamma_(register_parameter("gamma", weight_from(drawn_gamma(width, modes)))),
      omega_(register_parameter("omega", truncated_normal_weight({width, 1}, 0.25, 4))) {}

EmaWeights MovingAverage::weights() const {
  EmaWeights out{alpha_, delta_, theta_, gamma_, omega_};
  if (at::GradMode::is_enabled() || !alpha_.is_cpu()) return out;
  const std::lock_guard lock(mutex_);
  const at::Tensor* const weights[] = {&alpha_, &delta_, &theta_, &gamma_};
  bool same = !kept_.made_of.empty();
  for (std::size_t i = 0; same && i < kept_.made_of.size(); ++i)
    same = kept_.made_of[i].first.const_data_ptr() == weights[i]->const_data_ptr() &&
           kept_.made_of[i].second == weights[i]->_version();
  if (!same) {
    kept_.made_of.clear();
    for (const at::Tensor* weight : weights)
      kept_.made_of.emplace_back(weight->detach(), weight->_version());
    kept_.planes = ema_planes(out);
  }
  out.planes_5MD = kept_.planes;
  return out;
}

NormalizedFfn::NormalizedFfn(const FfnSettings& s) : settings_(s) {
  if (s.affine) {
    auto norm = register_module("norm", std::make_shared<Named>());
    norm_weight_ = norm->add("weight", constant_weight({s.width}, 0));
    norm_bias_ = norm->add("bias", constant_weight({s.width}, 0));
  }
  fc1_ = register_module("fc1", std::make_shared<Projection>(s.width, s.hidden, false));
  fc2_ = register_module("fc2", std::make_shared<Projection>(s.hidden, s.width, false));
  if (s.swiglu)
    fc3_ = register_module("fc3", std::make_shared<Projection>(s.width, s.hidden, false));
  if (s.rescale) {
    const double first = 0.1 * std::pow(0.5, static_cast<double>(s.layer_index));
    alpha_ = register_parameter("alpha", constant_weight({s.width}, first));
  }
}

at::Tensor NormalizedFfn::forward(const at::Tensor& x, const at::Tensor& residual) const {
  const at::Tensor s =
      norm_weight_.defined()
          ? at::layer_norm(x, {settings_.width}, norm_weight_ + 1, norm_bias_, settings_.eps)
          : at::layer_norm(x, {settings_.width}, {}, {}, settings_.eps);
  at::Tensor hidden = at::silu(fc1_->forward(s));
  if (fc3_ != nullptr) hidden = hidden * fc3_->forward(s);
  const at::Tensor y = fc2_->forward(hidden);
  return alpha_.defined() ? at::addcmul(residual, alpha_, y) : residual + y;
}

}  // namespace everlong::megalodon
