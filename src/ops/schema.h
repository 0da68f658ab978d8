// Operators in torch's dispatcher, namespace "everlong": callable by name from TorchScript, Python
// and anything else that holds a dispatcher, with shapes known on the meta device.
//
// Rooms register through a function and not through static objects, which the linker drops from
// static libraries.
#pragma once
#include <torch/library.h>

#include <string>

namespace everlong {

// Defines one operator. `compute` serves every device and differentiates itself; `meta` gives
// empty tensors of the right shapes.
template <class Compute, class Meta>
void define_operator(const std::string& schema, const Compute& compute, const Meta& meta) {
  // Kept for good: a Library takes its definitions back when it goes.
  static torch::Library library(torch::Library::FRAGMENT, "everlong", std::nullopt, __FILE__,
                                __LINE__);
  const std::string name = schema.substr(0, schema.find('('));
  library.def(schema.c_str());
  library.impl(name.c_str(), compute);
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Meta, meta));
}

}  // namespace everlong
