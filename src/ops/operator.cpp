#include "ops/operator.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

namespace everlong {
namespace {

TensorMap leaves(const TensorMap& tensors, bool wanted) {
  TensorMap out;
  for (const auto& [name, tensor] : tensors) {
    at::Tensor leaf = tensor.detach();
    if (wanted && leaf.is_floating_point()) leaf.set_requires_grad(true);
    out[name] = leaf;
  }
  return out;
}

}  // namespace

OpResult run_by_autograd(const OpCall& call, const OpFunction& forward) {
  const bool wanted = !call.grad_out.empty();
  const TensorMap inputs = leaves(call.inputs, wanted);
  const TensorMap state = leaves(call.state, wanted);
  at::AutoGradMode mode(wanted);
  OpResult result = forward(inputs, state);
  if (!wanted) return result;

  std::vector<at::Tensor> outputs, incoming;
  const auto add = [&](const std::string& name, const at::Tensor& output) {
    const auto found = call.grad_out.find(name);
    if (found == call.grad_out.end() || !output.requires_grad()) return;
    outputs.push_back(output);
    incoming.push_back(found->second.to(output.options()));
  };
  for (const auto& [name, tensor] : result.out) add(name, tensor);
  for (const auto& [name, tensor] : result.state) add("state." + name, tensor);

  std::vector<std::string> names;
  std::vector<at::Tensor> sources;
  const auto collect = [&](const std::string& prefix, const TensorMap& tensors) {
    for (const auto& [name, tensor] : tensors) {
      if (!tensor.requires_grad()) continue;
      names.push_back(prefix + name);
      sources.push_back(tensor);
    }
  };
  collect("", inputs);
  collect("state.", state);
  const auto gradients =
      outputs.empty()
          ? std::vector<at::Tensor>(sources.size())
          : torch::autograd::grad(outputs, sources, incoming, /*retain_graph=*/std::nullopt,
                                  /*create_graph=*/false, /*allow_unused=*/true);
  // An input that no output depends on (T = 0, say) has the gradient zero.
  for (std::size_t i = 0; i < names.size(); ++i)
    result.grad[names[i]] = gradients[i].defined() ? gradients[i] : at::zeros_like(sources[i]);
  for (auto& [name, tensor] : result.out) tensor = tensor.detach();
  for (auto& [name, tensor] : result.state) tensor = tensor.detach();
  return result;
}

void throw_if_error(const Status& status) { TORCH_CHECK_VALUE(status.ok(), status.message()); }

}  // namespace everlong
