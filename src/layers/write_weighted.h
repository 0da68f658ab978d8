// Layers whose memory can store a token another number of times than once.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

class WriteWeighted {
 public:
  virtual ~WriteWeighted() = default;
  // How often each token of the following calls is stored, >= 0, of the shape [B, T] that they
  // have; undefined: once each. No gradient. Stays until it is set anew.
  virtual void set_write_weight(const at::Tensor& weight_BT) = 0;
};

}  // namespace everlong
