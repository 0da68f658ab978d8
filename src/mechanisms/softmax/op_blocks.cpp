#include "mechanisms/softmax/op_blocks.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::softmax {
namespace {

// CPU: 64 rows waste least beyond the diagonal (256 rows were 30 to 60 % slower at T = 256, equal
// at 4096), and 1 MB of scores stays in a core's L2 through its five passes. GPU: blocks large
// enough to fill it, 256 MB of scores.
constexpr std::int64_t kCpuRows = 64, kCpuColumns = 512, kCpuScores = std::int64_t{1} << 18;
constexpr std::int64_t kGpuRows = 1024, kGpuColumns = 4096, kGpuScores = std::int64_t{1} << 26;

}  // namespace

Plan make_plan(const at::Tensor& q_MRK, const at::Tensor& k_MSK, std::int64_t group,
               std::int64_t window, double scale) {
  Plan p;
  p.matrices = q_MRK.size(0);
  p.group = group;
  p.tokens = q_MRK.size(1) / group;
  p.keys = k_MSK.size(1);
  p.window = window;
  p.scale = scale;
  p.wide = q_MRK.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // The CPU multiplies low precision in fp32: without AMX its bf16 products are several times
  // slower.
  const bool gpu = q_MRK.is_cuda();
  p.operand = gpu ? q_MRK.scalar_type() : p.wide;
  p.rows = std::min(p.tokens, std::max<std::int64_t>((gpu ? kGpuRows : kCpuRows) / group, 1));
  // A few rows (decoding) take as many scores a block, not as many columns.
  const std::int64_t fullness =
      (gpu ? kGpuRows : kCpuRows) / std::max<std::int64_t>(p.rows * group, 1);
  p.columns = (gpu ? kGpuColumns : kCpuColumns) * std::max<std::int64_t>(fullness, 1);
  const std::int64_t scores =
      std::max<std::int64_t>(p.rows * group * std::min(p.columns, p.keys), 1);
  p.together = std::clamp<std::int64_t>((gpu ? kGpuScores : kCpuScores) / scores, 1,
                                        std::max<std::int64_t>(p.matrices, 1));
  return p;
}

std::vector<Block> make_blocks(const Plan& p) {
  std::vector<Block> list;
  for (std::int64_t m = 0; m < p.matrices; m += p.together)
    for (std::int64_t t = 0; t < p.tokens; t += p.rows) {
      const std::int64_t count = std::min(p.rows, p.tokens - t);
      const std::int64_t end = std::max<std::int64_t>(p.first_row_key(t + count), 0);
      const std::int64_t begin =
          p.window > 0 ? std::clamp<std::int64_t>(p.first_row_key(t) - p.window + 1, 0, end) : 0;
      list.push_back({m, std::min(p.together, p.matrices - m), t, count, begin, end});
    }
  return list;
}

at::Tensor rows_of(const at::Tensor& x_MRD, const Block& block, const Plan& p) {
  return x_MRD.narrow(0, block.matrix, block.matrices)
      .narrow(1, block.token * p.group, block.tokens * p.group);
}

at::Tensor keys_of(const at::Tensor& x_MSD, const Block& block, std::int64_t begin,
                   std::int64_t count) {
  return x_MSD.narrow(0, block.matrix, block.matrices).narrow(1, begin, count);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, const Plan& p) {
  return p.operand == p.wide ? at::bmm(a, b) : at::bmm(a, b, p.wide);
}

Scores::Scores(const Plan& plan, const at::TensorOptions& options) : plan_(plan) {
  const auto wide = options.dtype(plan.wide);
  const std::int64_t width = std::min(plan.columns, plan.keys);
  scratch_ = at::empty({plan.together * plan.rows * plan.group * width}, wide);
  const at::Tensor hidden =
      at::full({plan.rows, std::max<std::int64_t>(plan.rows - 1, 0)}, -kInfinity, wide);
  future_ = hidden.triu(0);
  forgotten_ = hidden.tril(-1);
}

at::Tensor Scores::product(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor s = scratch_.narrow(0, 0, a.size(0) * a.size(1) * b.size(1))
                     .view({a.size(0), a.size(1), b.size(1)});
  if (plan_.operand == plan_.wide) {
    at::bmm_out(s, a, b.mT());
  } else {
    at::bmm_out(s, a, b.mT(), plan_.wide);
  }
  return s;
}

at::Tensor Scores::make(const Block& block, const at::Tensor& q, const at::Tensor& k,
                        std::int64_t begin) {
  // Scaling the rows is the smaller pass, and exact enough unless they are low precision.
  const at::Tensor s =
      plan_.operand == plan_.wide ? product(q * plan_.scale, k) : product(q, k).mul_(plan_.scale);
  // Row i sits at key `own` + i. The keys own + 1 + j are the future of rows i <= j; the keys
  // own - window + 1 + j have left the window of rows i > j. Only these two bands need a mask.
  const std::int64_t own = plan_.first_row_key(block.token);
  hide(s, block, future_, own + 1, begin);
  if (plan_.window > 0) hide(s, block, forgotten_, own - plan_.window + 1, begin);
  return s;
}

void Scores::hide(const at::Tensor& scores, const Block& block, const at::Tensor& mask,
                  std::int64_t band, std::int64_t begin) {
  const std::int64_t from = std::max(band, begin);
  const std::int64_t to = std::min(band + block.tokens - 1, begin + scores.size(2));
  if (from >= to) return;
  scores.view({scores.size(0), block.tokens, plan_.group, scores.size(2)})
      .narrow(3, from - begin, to - from)
      .add_(mask.narrow(0, 0, block.tokens).narrow(1, from - band, to - from).unsqueeze(1));
}

}  // namespace everlong::softmax
