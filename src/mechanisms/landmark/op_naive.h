// The grouped softmax with every score at once.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong::landmark {

struct Grouped {
  at::Tensor weights;  // [B, H, T, S]
  at::Tensor lse;      // [B, H, T]
};
// scores [B, H, T, S], the first query in column `prefix`; marks [B, S] on the CPU. In the dtype of
// the scores, differentiable.
Grouped group_scores(const at::Tensor& scores_BHTS, const at::Tensor& marks_BS, std::int64_t prefix,
                     bool drop_empty);

// q, k, v as attention() takes them; arguments are checked.
Grouped naive_weights(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                      const at::Tensor& marks_BS, double scale, bool drop_empty);
// -inf becomes 0, so that subtracting it from itself gives no NaN.
at::Tensor finite_base(const at::Tensor& x);
at::Tensor weighted_values(const at::Tensor& weights_BHTS, const at::Tensor& v_BSGV);

}  // namespace everlong::landmark
