#include "mechanisms/landmark/op_naive.h"

#include <ATen/ATen.h>

#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

at::Tensor finite_base(const at::Tensor& x) { return x.masked_fill(x.eq(-kInfinity), 0); }
namespace {}  // namespace

Grouped group_scores(const at::Tensor& scores, const at::Tensor& marks_BS, std::int64_t prefix,
                     bool drop_empty) {
  const std::int64_t B = scores.size(0), H = scores.size(1), T = scores.size(2), S = scores.size(3);
  if (T == 0) return {scores * 0, at::empty({B, H, 0}, scores.options())};
  const at::Tensor marks = marks_BS.to(at::kBool), counted = marks.to(at::kLong);
  const at::Tensor section_host = counted.cumsum(1) - counted;  // [B, S]: of each column
  const std::int64_t C = section_host.max().item<std::int64_t>() + 1;
  const auto integers = scores.options().dtype(at::kLong).requires_grad(false);
  const at::Tensor section = section_host.to(scores.device()), lm = marks.to(scores.device());
  const at::Tensor column = at::arange(S, integers), all = at::arange(C, integers);
  const at::Tensor own = at::arange(prefix, prefix + T, integers).unsqueeze(1);  // [T, 1]

  // [B, S, C]: which section an ordinary column is in; [B, 1, 1, C]: the landmark of a section.
  const at::Tensor belongs =
      section.unsqueeze(2).eq(all).logical_and(lm.logical_not().unsqueeze(2));
  const at::Tensor member = belongs.to(scores.scalar_type()).unsqueeze(1);
  const at::Tensor closes = section.unsqueeze(2).eq(all).logical_and(lm.unsqueeze(2));
  const at::Tensor closed = closes.any(1).view({B, 1, 1, C});
  const at::Tensor landmark = closes.to(at::kByte).argmax(1).view({B, 1, 1, C});
  const at::Tensor past = closed.logical_and(landmark.lt(own));  // [B, 1, T, C]
  const at::Tensor hidden =
      lm.view({B, 1, 1, S}).logical_or(column.gt(own).unsqueeze(0).unsqueeze(0));
  const at::Tensor empty = closed.logical_and(belongs.any(1).logical_not().view({B, 1, 1, C}));

  const at::Tensor seen = scores.masked_fill(hidden, -kInfinity);
  const at::Tensor of_column = section.view({B, 1, 1, S}).expand({B, H, T, S});
  at::Tensor top;
  {
    const at::NoGradGuard constant;  // any base gives the same weights
    top = at::full({B, H, T, C}, -kInfinity, scores.options())
              .scatter_reduce(3, of_column, seen.detach(), "amax");
    top = finite_base(top);
  }
  const at::Tensor e = seen.sub(top.gather(3, of_column)).exp();
  const at::Tensor sum = at::matmul(e, member);
  const at::Tensor none = sum.eq(0);
  const at::Tensor lambda = sum.masked_fill(none, 1).log().add(top).masked_fill(none, -kInfinity);
  at::Tensor whole = at::where(past, scores.gather(3, landmark.expand({B, H, T, C})), lambda);
  if (drop_empty) whole = whole.masked_fill(empty, -kInfinity);
  const at::Tensor base = finite_base(whole.detach().amax(-1, true));
  const at::Tensor share = whole.sub(base).exp();
  const at::Tensor total = share.sum(-1, true), blind = total.eq(0);
  const at::Tensor gate =
      share.div(total.masked_fill(blind, 1)).div(sum.masked_fill(none, 1)).masked_fill(none, 0);
  const at::Tensor lse =
      total.masked_fill(blind, 1).log().add(base).masked_fill(blind, -kInfinity).squeeze(-1);
  return {e.mul(at::matmul(gate, member.mT())), lse};
}

Grouped naive_weights(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                      const at::Tensor& marks_BS, double scale, bool drop_empty) {
  const std::int64_t R = q_BTHK.size(2) / k_BSGK.size(2);
  const at::Tensor q = q_BTHK.transpose(1, 2);
  const at::Tensor k = k_BSGK.repeat_interleave(R, 2).transpose(1, 2);
  return group_scores(at::matmul(q, k.mT()).mul(scale), marks_BS, k_BSGK.size(1) - q_BTHK.size(1),
                      drop_empty);
}

at::Tensor weighted_values(const at::Tensor& weights_BHTS, const at::Tensor& v_BSGV) {
  const std::int64_t R = weights_BHTS.size(1) / v_BSGV.size(2);
  // The value of a landmark has no effect, whatever it holds: its weight is exactly 0.
  const at::Tensor v = v_BSGV.repeat_interleave(R, 2).transpose(1, 2);
  return at::matmul(weights_BHTS, v).transpose(1, 2).contiguous();
}

}  // namespace everlong::landmark
