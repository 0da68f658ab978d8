// How error messages name a tensor.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "core/text.h"

namespace everlong {

// "Float [2, 3]", or "no tensor" where it is not defined.
inline std::string describe(const at::Tensor& x) {
  return x.defined() ? cat(x.scalar_type(), " ", x.sizes()) : std::string("no tensor");
}

}  // namespace everlong
