#include "train/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <functional>
#include <set>

namespace everlong {
namespace {

using Tensors = std::vector<at::Tensor>;

}  // namespace

AdamW::AdamW(const std::vector<std::pair<std::string, at::Tensor>>& parameters,
             const AdamWOptions& options)
    : options_(options) {
  c10::NoGradGuard no_grad;
  for (const auto& [name, parameter] : parameters) {
    Slot slot;
    slot.name = name;
    slot.parameter = slot.master = parameter;
    slot.decays = parameter.dim() > 1;
    slot.rate_factor = 1;
    for (const auto& [ending, factor] : options.rate_factors)
      if (name.ends_with(ending)) slot.rate_factor = factor;
    if (parameter.scalar_type() == at::kBFloat16) {
      slot.master = parameter.detach().to(at::kFloat);
      has_masters_ = true;
    }
    slot.exp_avg = at::zeros_like(slot.master, at::MemoryFormat::Preserve).detach();
    slot.exp_avg_sq = at::zeros_like(slot.exp_avg);
    slot.step = at::zeros({}, parameter.options().dtype(at::kFloat).requires_grad(false));
    slots_.push_back(std::move(slot));
  }
}

void AdamW::take_gradients() {
  c10::NoGradGuard no_grad;
  Tensors sums, fresh;
  for (auto& slot : slots_) {
    at::Tensor gradient = slot.parameter.grad();
    if (!gradient.defined()) continue;
    slot.parameter.mutable_grad().reset();
    if (slot.gradient.defined()) {
      sums.push_back(slot.gradient);
      fresh.push_back(gradient);
    } else {
      slot.gradient = gradient.detach().to(slot.master.scalar_type());
    }
  }
  if (!sums.empty()) at::_foreach_add_(sums, fresh);
}

at::Tensor AdamW::clip_gradients(double max_norm) {
  c10::NoGradGuard no_grad;
  Tensors gradients;
  for (const auto& slot : slots_)
    if (slot.gradient.defined()) gradients.push_back(slot.gradient);
  if (gradients.empty()) return at::zeros({}, slots_.front().master.options().requires_grad(false));
  const at::Tensor norm = at::stack(at::_foreach_norm(gradients, 2)).norm();
  if (max_norm > 0) at::_foreach_mul_(gradients, (max_norm / norm).clamp_max(1.0));
  return norm;
}

void AdamW::step(double lr) {
  c10::NoGradGuard no_grad;
  std::set<std::pair<bool, double>, std::greater<>> groups;  // those that decay first
  for (const auto& slot : slots_) groups.emplace(slot.decays, slot.rate_factor);
  for (const auto& [decays, factor] : groups) {
    Tensors masters, gradients, exp_avgs, exp_avg_sqs, steps;
    for (const auto& slot : slots_) {
      if (slot.decays != decays || slot.rate_factor != factor || !slot.gradient.defined()) continue;
      masters.push_back(slot.master);
      gradients.push_back(slot.gradient);
      exp_avgs.push_back(slot.exp_avg);
      exp_avg_sqs.push_back(slot.exp_avg_sq);
      steps.push_back(slot.step);
    }
    if (masters.empty()) continue;
    at::_foreach_add_(steps, 1);
    at::_fused_adamw_(masters, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps,
                      lr * factor, options_.beta1, options_.beta2,
                      decays ? options_.weight_decay : 0.0, options_.eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
  if (has_masters_) {
    Tensors parameters, masters;
    for (const auto& slot : slots_) {
      parameters.push_back(slot.parameter);
      masters.push_back(slot.master);
    }
    at::_foreach_copy_(parameters, masters);
  }
  // Neither of the two counts as a change in the parameters' versions, by which layers know whether
  // what they derived from a parameter still belongs to it.
  for (const auto& slot : slots_)
    if (slot.gradient.defined()) slot.parameter.unsafeGetTensorImpl()->bump_version();
  clear_gradients();
}

void AdamW::clear_gradients() {
  for (auto& slot : slots_) slot.gradient.reset();
}

TensorMap AdamW::gradients() const {
  TensorMap all;
  for (const auto& slot : slots_)
    if (slot.gradient.defined()) all[slot.name] = slot.gradient;
  return all;
}

TensorMap AdamW::tensors() const {
  TensorMap all;
  for (const auto& slot : slots_) {
    all[slot.name + ".exp_avg"] = slot.exp_avg;
    all[slot.name + ".exp_avg_sq"] = slot.exp_avg_sq;
    all[slot.name + ".step"] = slot.step;
    if (has_masters_) all[slot.name + ".master"] = slot.master;
  }
  return all;
}

Status AdamW::restore(const TensorMap& tensors) {
  c10::NoGradGuard no_grad;
  const TensorMap mine = this->tensors();
  for (const auto& [name, own] : mine) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return invalid_argument("optimizer state: ", name, " is missing");
    if (found->second.sizes() != own.sizes() || found->second.scalar_type() != own.scalar_type())
      return invalid_argument("optimizer state: ", name, " is ", found->second.scalar_type(), " ",
                              found->second.sizes(), "; this model needs ", own.scalar_type(), " ",
                              own.sizes());
  }
  for (const auto& [name, tensor] : tensors)
    if (!mine.contains(name))
      return invalid_argument("optimizer state: ", name, " belongs to no parameter");
  for (const auto& [name, own] : mine) at::Tensor(own).copy_(tensors.at(name));
  if (has_masters_)
    for (auto& slot : slots_) slot.parameter.copy_(slot.master);
  return {};
}

}  // namespace everlong
