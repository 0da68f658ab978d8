// The CPU kernel behind an autograd function.
#pragma once
#include "mechanisms/landmark/op.h"

namespace everlong::landmark {

// Whether the kernel takes these tensors; if not, why.
Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// As attention(); arguments are checked.
Attended attention_by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& marks, double scale, bool drop_empty);

}  // namespace everlong::landmark
