// The composite form, and the plain one it stands in for where sections are very uneven.
#pragma once
#include "mechanisms/landmark/op.h"

namespace everlong::landmark {

// Arguments are checked (op.cpp).
Attended attention_by_composite(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                                const at::Tensor& v_BSGV, const at::Tensor& marks_BS, double scale,
                                bool drop_empty);

}  // namespace everlong::landmark
