#include "train/backprop.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <numeric>

#include "layers/write_weighted.h"
#include "ops/linear_cross_entropy.h"

namespace everlong {
namespace {

// int32 values of a batch as int64 [B, T] on the device.
at::Tensor to_device(const std::vector<std::int32_t>& values, const Batch& batch,
                     at::Device device) {
  auto* const data =
      const_cast<std::int32_t*>(values.data());  // from_blob has no const form; it is only read
  return at::from_blob(data, {batch.rows, batch.tokens}, at::kInt).to(device).to(at::kLong);
}

// Weights of a batch as fp32 [B, T] on the device; undefined where all are 1.
at::Tensor weights_on(const std::vector<float>& weights, const Batch& batch, at::Device device) {
  if (weights.empty()) return {};
  auto* const data = const_cast<float*>(weights.data());
  return at::from_blob(data, {batch.rows, batch.tokens}, at::kFloat)
      .to(device, at::kFloat, false,
          /*copy=*/true);
}

at::Tensor columns(const at::Tensor& values_BT, const SegmentPlan& plan) {
  const at::Tensor part = values_BT.narrow(1, plan.first, plan.tokens);
  return plan.sequences.offsets.empty() ? part : part.reshape({1, -1});
}

void set_write_weight(Decoder& model, const at::Tensor& weight_BT) {
  for (std::int64_t i = 0; i < model.config().num_layers(); ++i)
    if (auto* const layer = dynamic_cast<WriteWeighted*>(&model.mixer(i)))
      layer->set_write_weight(weight_BT);
}

// The layers keep the weights of a segment through its backward pass, which may run them again, and
// forget them at the end of the batch.
class WritesOfABatch {
 public:
  WritesOfABatch(Decoder& model, const at::Tensor& writes_BT)
      : model_(writes_BT.defined() ? &model : nullptr) {}
  ~WritesOfABatch() {
    if (model_ != nullptr) set_write_weight(*model_, {});
  }
  WritesOfABatch(const WritesOfABatch&) = delete;
  WritesOfABatch& operator=(const WritesOfABatch&) = delete;

 private:
  Decoder* model_;
};

bool is_identity(const std::vector<std::int64_t>& indices, std::int64_t count) {
  if (static_cast<std::int64_t>(indices.size()) != count) return false;
  for (std::int64_t i = 0; i < count; ++i)
    if (indices[static_cast<std::size_t>(i)] != i) return false;
  return true;
}

// The state of the rows out of the state of the sequences; a copy only where they differ.
ModelState leaving(ModelState state, const SegmentPlan& plan) {
  return is_identity(plan.leave, state.sequences()) ? std::move(state) : state.select(plan.leave);
}

}  // namespace

Carry carry_from_name(const std::string& name) {
  if (name == "detached") return Carry::kDetached;
  return name == "exact" ? Carry::kExact : Carry::kNone;
}

std::vector<SegmentPlan> plan_segments(const Batch& batch, std::int64_t segment_tokens) {
  const std::int64_t step =
      segment_tokens > 0 ? std::min(segment_tokens, batch.tokens) : batch.tokens;
  const auto& starts = batch.document_starts;
  std::vector<SegmentPlan> plans;
  for (std::int64_t first = 0; first < batch.tokens; first += step) {
    SegmentPlan plan{.first = first, .tokens = std::min(step, batch.tokens - first)};
    auto& offsets = plan.sequences.offsets;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const std::int64_t from = row * batch.tokens + first, to = from + plan.tokens;
      auto start = std::ranges::lower_bound(starts, from);
      const bool starts_here = start != starts.end() && *start == from;
      const bool goes_on =
          first == 0 ? batch.row_continues[static_cast<std::size_t>(row)] != 0 : !starts_here;
      offsets.push_back(row * plan.tokens);
      plan.enter.push_back(goes_on ? row : -1);
      for (start += starts_here ? 1 : 0; start != starts.end() && *start < to; ++start) {
        offsets.push_back(row * plan.tokens + *start - from);
        plan.enter.push_back(-1);
      }
      plan.leave.push_back(static_cast<std::int64_t>(plan.enter.size()) - 1);
    }
    offsets.push_back(batch.rows * plan.tokens);
    if (static_cast<std::int64_t>(plan.enter.size()) == batch.rows) offsets.clear();
    plans.push_back(std::move(plan));
  }
  return plans;
}

ModelState Backprop::entering(const ModelState& carried, const SegmentPlan& plan) const {
  return is_identity(plan.enter, carried.sequences()) ? carried.clone()
                                                      : carried.select(plan.enter);
}

Backprop::Line Backprop::on_device(const Batch& batch) const {
  return {to_device(batch.inputs, batch, device_), to_device(batch.targets, batch, device_),
          weights_on(batch.weights, batch, device_), weights_on(batch.writes, batch, device_)};
}

at::Tensor Backprop::hidden(const Line& line, const SegmentPlan& plan, ModelState* state) {
  if (line.writes_BT.defined()) set_write_weight(model_, columns(line.writes_BT, plan));
  return model_.hidden(columns(line.inputs_BT, plan), plan.sequences, state);
}

at::Tensor Backprop::loss(const Line& line, const SegmentPlan& plan, ModelState* state) {
  const at::Tensor hidden_BTD = hidden(line, plan, state);
  return linear_cross_entropy(
             hidden_BTD.flatten(0, 1), model_.head_weight(),
             columns(line.targets_BT, plan).flatten(), /*chunk=*/0,
             line.weights_BT.defined() ? columns(line.weights_BT, plan).flatten() : at::Tensor())
      .nll_sum;
}

at::Tensor Backprop::score(const Batch& batch) {
  c10::NoGradGuard no_grad;
  const Line line = on_device(batch);
  const WritesOfABatch writes(model_, line.writes_BT);
  if (!carried_ || carried_->sequences() != batch.rows) carried_ = model_.make_state(batch.rows);
  at::Tensor total;
  for (const auto& plan : plan_segments(batch, segment_tokens_)) {
    ModelState state = entering(*carried_, plan);
    const at::Tensor nll = loss(line, plan, &state);
    carried_ = leaving(std::move(state), plan);
    total = total.defined() ? total + nll : nll;
  }
  return total;
}

Status Backprop::restore_carried(const TensorMap& tensors,
                                 const std::vector<std::int64_t>& positions) {
  ModelState state = model_.make_state(static_cast<std::int64_t>(positions.size()));
  TensorMap here;
  for (const auto& [name, tensor] : tensors) here[name] = tensor.to(device_);
  EVERLONG_RETURN_IF_ERROR(state.restore(here, positions));
  carried_ = std::move(state);
  return {};
}

at::Tensor Backprop::run(const Batch& batch, double scale,
                         const std::function<void()>& after_backward) {
  const Line line = on_device(batch);
  const WritesOfABatch writes(model_, line.writes_BT);
  const auto plans = plan_segments(batch, carry_ == Carry::kNone ? 0 : segment_tokens_);
  if (carry_ == Carry::kNone) {
    const at::Tensor nll = loss(line, plans.front(), nullptr);
    torch::autograd::backward({nll * scale}, {});
    if (after_backward) after_backward();
    return nll.detach();
  }
  if (!carried_ || carried_->sequences() != batch.rows) carried_ = model_.make_state(batch.rows);
  return carry_ == Carry::kDetached ? run_detached(line, plans, scale, after_backward)
                                    : run_exact(line, plans, scale, after_backward);
}

at::Tensor Backprop::run_detached(const Line& line, const std::vector<SegmentPlan>& plans,
                                  double scale, const std::function<void()>& after_backward) {
  at::Tensor total;
  for (const auto& plan : plans) {
    ModelState state = entering(*carried_, plan);
    const at::Tensor nll = loss(line, plan, &state);
    torch::autograd::backward({nll * scale}, {});
    if (after_backward) after_backward();
    state.detach();
    carried_ = leaving(std::move(state), plan);
    total = total.defined() ? total + nll.detach() : nll.detach();
  }
  return total;
}

at::Tensor Backprop::run_exact(const Line& line, const std::vector<SegmentPlan>& plans,
                               double scale, const std::function<void()>& after_backward) {
  std::vector<ModelState> borders;  // the rows' state before each segment
  borders.push_back(carried_->clone());
  {
    c10::NoGradGuard no_grad;
    for (std::size_t s = 0; s + 1 < plans.size(); ++s) {
      ModelState state = entering(borders.back(), plans[s]);
      hidden(line, plans[s], &state);
      borders.push_back(leaving(std::move(state), plans[s]));
    }
  }
  at::Tensor total;
  TensorMap incoming;  // dL / d(state after the segment), by the tensors' names
  for (std::size_t s = plans.size(); s-- > 0;) {
    ModelState before = std::move(borders.back());
    borders.pop_back();
    TensorMap leaves = before.tensors();
    for (auto& [name, tensor] : leaves) {
      tensor = tensor.detach();
      if (s > 0 && tensor.is_floating_point()) tensor.set_requires_grad(true);
    }
    throw_if_error(before.restore(leaves, std::vector<std::int64_t>(before.positions())));
    ModelState state = entering(before, plans[s]);
    const at::Tensor nll = loss(line, plans[s], &state);
    state = leaving(std::move(state), plans[s]);

    std::vector<at::Tensor> roots = {nll * scale}, gradients = {at::ones_like(nll)};
    const TensorMap after = state.tensors();
    for (const auto& [name, gradient] : incoming) {
      const at::Tensor& root = after.at(name);
      if (!root.requires_grad()) continue;  // a fresh document in every row: nothing flows back
      roots.push_back(root);
      gradients.push_back(gradient);
    }
    torch::autograd::backward(roots, gradients);
    if (after_backward) after_backward();
    if (s + 1 == plans.size()) {
      state.detach();
      carried_ = std::move(state);
    }
    incoming.clear();
    for (const auto& [name, leaf] : leaves)
      if (leaf.requires_grad() && leaf.grad().defined()) incoming[name] = leaf.grad();
    total = total.defined() ? total + nll.detach() : nll.detach();
  }
  return total;
}

}  // namespace everlong
