#include "models/recompute.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace everlong {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What travels to the backward pass besides tensors. Those go in one list: x, the state's, the
// parameters.
struct Call : torch::CustomClassHolder {
  BlockFunction block;
  std::unique_ptr<State> state;  // runs the forward pass; null without a state
  std::unique_ptr<State> blank;  // fresh: takes positions and saved tensors in the backward pass
  std::vector<std::int64_t> positions;
  std::vector<std::string> names;
};

void append(variable_list& list, const TensorMap& tensors) {
  for (const auto& [name, tensor] : tensors) list.push_back(tensor);
}

Tensor as_leaf(const Tensor& tensor) {
  return tensor.detach().set_requires_grad(tensor.is_floating_point());
}

struct Recompute : torch::autograd::Function<Recompute> {
  // -> y, then the tensors of the state after the call. Grad mode is off in here.
  static variable_list forward(AutogradContext* context, c10::intrusive_ptr<Call> call,
                               at::TensorList inputs) {
    variable_list outputs = {call->block(inputs[0], call->state.get())};
    if (call->state != nullptr) append(outputs, call->state->tensors());
    variable_list fixed;
    for (const Tensor& tensor : outputs)
      if (!tensor.is_floating_point()) fixed.push_back(tensor);
    context->mark_non_differentiable(fixed);
    context->set_materialize_grads(false);
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    context->save_for_backward(inputs.vec());
    return outputs;
  }

  static variable_list backward(AutogradContext* context, variable_list incoming) {
    const auto call =
        c10::static_intrusive_pointer_cast<Call>(context->saved_data["call"].toCapsule());
    const variable_list saved = context->get_saved_variables();
    at::AutoGradMode on(true);

    const std::size_t carried = call->names.size();
    variable_list sources = {as_leaf(saved[0])};
    std::unique_ptr<State> state;
    if (call->blank != nullptr) {
      state = call->blank->clone();
      state->positions() = call->positions;
      TensorMap tensors;
      for (std::size_t i = 0; i < carried; ++i)
        sources.push_back(tensors[call->names[i]] = as_leaf(saved[i + 1]));
      throw_if_error(state->restore(tensors));
    }
    sources.insert(sources.end(), saved.begin() + 1 + static_cast<std::ptrdiff_t>(carried),
                   saved.end());

    variable_list outputs = {call->block(sources[0], state.get())};
    if (state != nullptr) append(outputs, state->tensors());
    variable_list differentiated, gradients, wanted;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!incoming[i].defined() || !outputs[i].requires_grad()) continue;
      differentiated.push_back(outputs[i]);
      gradients.push_back(incoming[i]);
    }
    std::vector<std::size_t> places;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      if (!sources[i].requires_grad()) continue;
      wanted.push_back(sources[i]);
      places.push_back(i + 1);  // slot 0 is the Call
    }
    variable_list result(1 + sources.size());
    if (differentiated.empty()) return result;
    const variable_list found =
        torch::autograd::grad(differentiated, wanted, gradients, /*retain_graph=*/std::nullopt,
                              /*create_graph=*/false, /*allow_unused=*/true);
    for (std::size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

}  // namespace

at::Tensor recomputed(const BlockFunction& block, const at::Tensor& x_BTD, State* state,
                      const std::vector<at::Tensor>& parameters) {
  auto call = c10::make_intrusive<Call>();
  call->block = block;
  variable_list inputs = {x_BTD};
  if (state != nullptr) {
    const TensorMap before = state->tensors();
    for (const auto& [name, tensor] : before) call->names.push_back(name);
    append(inputs, before);
    // The forward pass runs on a copy: without gradients a layer may write into its state in place,
    // and what went in is needed again.
    at::NoGradGuard off;
    call->state = state->clone();
    call->blank =
        state->select(std::vector<std::int64_t>(static_cast<std::size_t>(state->sequences()), -1));
    call->positions = state->positions();
  }
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  // As a TensorList: autograd looks for tensors in no other container.
  const variable_list outputs = Recompute::apply(call, at::TensorList(inputs));
  if (state != nullptr) {
    TensorMap after;
    std::size_t next = 1;
    for (const auto& [name, tensor] : call->state->tensors()) after[name] = outputs[next++];
    state->positions() = call->state->positions();
    throw_if_error(state->restore(after));
    call->state.reset();
  }
  return outputs[0];
}

}  // namespace everlong
