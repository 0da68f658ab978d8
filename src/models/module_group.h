// A module that only gives its children a name in front of theirs.
#pragma once
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <utility>

namespace everlong {

struct ModuleGroup : torch::nn::Module {
  template <class Child>
  std::shared_ptr<Child> add(const std::string& name, std::shared_ptr<Child> child) {
    return register_module(name, std::move(child));
  }
  at::Tensor add_weight(const at::Tensor& weight) { return register_parameter("weight", weight); }
};

}  // namespace everlong
