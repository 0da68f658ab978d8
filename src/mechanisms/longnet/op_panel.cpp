#include "mechanisms/longnet/op_panel.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "mechanisms/longnet/params.h"

namespace everlong::longnet {
namespace {

// Below any score, yet finite: a row that saw nothing so far must not give inf - inf.
constexpr double kFloor = -1e30;

// Scores held at a time. CPU: 1 MB stays in a core's second cache; GPU: enough to fill it.
constexpr std::int64_t kCpuRows = 64, kCpuColumns = 512, kCpuScores = std::int64_t{1} << 18;
constexpr std::int64_t kGpuRows = 1024, kGpuColumns = 4096, kGpuScores = std::int64_t{1} << 26;

// XPos powers of a block of queries stay below 2^60, so that fp32 holds them and their inverses;
// further away they are cut off at 2^-120 (nothing) and 2^120.
constexpr double kMostPower = 60, kCutPower = 120;

struct Block {
  std::int64_t matrix, matrices, query, queries, keys;  // the block's rows see keys [0, keys)
};

std::int64_t columns_of(const Panel& p) {
  const bool gpu = p.q_MRK.is_cuda();
  const std::int64_t rows = std::max<std::int64_t>(p.queries() * p.group, 1);
  return (gpu ? kGpuColumns : kCpuColumns) *
         std::max<std::int64_t>((gpu ? kGpuRows : kCpuRows) / rows, 1);
}

template <class Work>
void for_each_block(const Panel& p, const Work& work) {
  const bool gpu = p.q_MRK.is_cuda();
  std::int64_t rows = std::max<std::int64_t>((gpu ? kGpuRows : kCpuRows) / p.group, 1);
  if (p.fade != nullptr) {
    const double steepest = std::log2(1.4 / 0.4) / p.fade->base * static_cast<double>(p.ratio);
    rows = std::clamp<std::int64_t>(static_cast<std::int64_t>(kMostPower / steepest), 1, rows);
  }
  rows = std::min(rows, p.queries());
  const std::int64_t scores =
      std::max<std::int64_t>(rows * p.group * std::min(columns_of(p), p.keys()), 1);
  const std::int64_t all = p.q_MRK.size(0);
  const std::int64_t together = std::clamp<std::int64_t>((gpu ? kGpuScores : kCpuScores) / scores,
                                                         1, std::max<std::int64_t>(all, 1));
  for (std::int64_t m = 0; m < all; m += together)
    for (std::int64_t t = 0; t < p.queries(); t += rows) {
      const std::int64_t count = std::min(rows, p.queries() - t);
      const std::int64_t keys = p.causal ? p.keys() - p.queries() + t + count : p.keys();
      work(Block{m, std::min(together, all - m), t, count, keys});
    }
}

at::Tensor rows_of(const at::Tensor& x_MRD, const Block& b, const Panel& p) {
  return x_MRD.narrow(0, b.matrix, b.matrices).narrow(1, b.query * p.group, b.queries * p.group);
}
at::Tensor keys_of(const at::Tensor& x_MSD, const Block& b, std::int64_t begin,
                   std::int64_t count) {
  return x_MSD.narrow(0, b.matrix, b.matrices).narrow(1, begin, count);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType wide) {
  return a.scalar_type() == wide ? at::bmm(a, b) : at::bmm(a, b, wide);
}

// Powers zeta^((from + n - origin) ratio / base) for n < count, [count, K]; sign -1: of keys.
at::Tensor powers(const Panel& p, std::int64_t from, std::int64_t count, std::int64_t origin,
                  double sign) {
  const at::Tensor& zeta = p.fade->log2_zeta;
  const at::Tensor steps = at::arange(from - origin, from - origin + count, zeta.options())
                               .mul_(sign * static_cast<double>(p.ratio) / p.fade->base);
  return steps.unsqueeze(1).mul(zeta).clamp_(-kCutPower, kCutPower).exp2_();
}

// Scaled and faded queries of a block, and its keys.
at::Tensor block_queries(const Panel& p, const Block& b, at::ScalarType operand) {
  const at::Tensor q = rows_of(p.q_MRK, b, p);
  if (p.fade == nullptr) return q;
  const std::int64_t place = p.keys() - p.queries() + b.query;
  const at::Tensor power = powers(p, place, b.queries, place, 1).repeat_interleave(p.group, 0);
  return (q * power).to(operand);
}
at::Tensor block_keys(const Panel& p, const Block& b, std::int64_t begin, std::int64_t count,
                      at::ScalarType operand) {
  const at::Tensor k = keys_of(p.k_MSK, b, begin, count);
  if (p.fade == nullptr) return k;
  const std::int64_t place = p.keys() - p.queries() + b.query;
  return (k * powers(p, begin, count, place, -1)).to(operand);
}

// Hides from each row the keys behind its own place. Only the band of the block's own rows needs
// it.
void hide_future(const at::Tensor& scores, const Panel& p, const Block& b, std::int64_t begin) {
  if (!p.causal || b.queries < 2) return;
  const std::int64_t band = p.keys() - p.queries() + b.query + 1;  // row i hides band + j, j >= i
  const std::int64_t from = std::max(band, begin),
                     to = std::min(band + b.queries - 1, begin + scores.size(2));
  if (from >= to) return;
  const at::Tensor future =
      at::ones({b.queries, b.queries - 1}, scores.options().dtype(at::kBool)).triu_(0);
  scores.view({scores.size(0), b.queries, p.group, scores.size(2)})
      .narrow(3, from - begin, to - from)
      .masked_fill_(future.narrow(1, from - band, to - from).unsqueeze(1), -kInfinity);
}

at::Tensor make_scores(const Panel& p, const Block& b, const at::Tensor& q, const at::Tensor& k,
                       std::int64_t begin, at::ScalarType wide) {
  at::Tensor s = product(q, k.mT(), wide).mul_(p.scale);
  hide_future(s, p, b, begin);
  return s;
}

}  // namespace

Fade make_fade(std::int64_t key_dim, double base, const at::TensorOptions& options) {
  const at::Tensor pair = at::arange(key_dim, options.dtype(at::kDouble)).div_(2).floor_();
  const auto dim = static_cast<double>(key_dim);
  const at::Tensor zeta = pair.mul_(2).add_(0.4 * dim).div_(1.4 * dim);
  return {zeta.log2_().to(options.dtype()), base};
}

at::ScalarType wide_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}
at::ScalarType operand_of(const at::Tensor& x) {
  // The CPU multiplies low precision in fp32: without AMX its bf16 products are several times
  // slower.
  return x.is_cuda() ? x.scalar_type() : wide_of(x.scalar_type());
}

PanelResult panel_forward(const Panel& p) {
  const at::ScalarType operand = p.q_MRK.scalar_type(), wide = wide_of(operand);
  const auto options = p.q_MRK.options().dtype(wide);
  PanelResult result{at::empty({p.q_MRK.size(0), p.q_MRK.size(1), p.v_MSV.size(2)}, options),
                     at::empty({p.q_MRK.size(0), p.q_MRK.size(1), 1}, options)};
  const std::int64_t columns = columns_of(p);
  for_each_block(p, [&](const Block& b) {
    const at::Tensor q = block_queries(p, b, operand);
    at::Tensor top, sum, weighted;  // running maximum, sum of exp, and sum of exp times v
    if (p.phantom > 0) {            // keys of score 0 and value 0
      top = at::zeros({b.matrices, b.queries * p.group, 1}, options);
      sum = at::full_like(top, static_cast<double>(p.phantom));
      weighted = at::zeros({b.matrices, b.queries * p.group, p.v_MSV.size(2)}, options);
    }
    for (std::int64_t s = 0; s < b.keys; s += columns) {
      const std::int64_t count = std::min(columns, b.keys - s);
      const at::Tensor e = make_scores(p, b, q, block_keys(p, b, s, count, operand), s, wide);
      at::Tensor tile_top = e.amax(-1, true).clamp_min_(kFloor);
      if (top.defined()) tile_top = at::maximum(tile_top, top);
      e.sub_(tile_top).exp_();
      const at::Tensor tile_sum = e.sum(-1, true);
      const at::Tensor tile_weighted = product(e.to(operand), keys_of(p.v_MSV, b, s, count), wide);
      if (top.defined()) {
        const at::Tensor fade = top.sub_(tile_top).exp_();
        sum.mul_(fade).add_(tile_sum);
        weighted.mul_(fade).add_(tile_weighted);
      } else {
        sum = tile_sum;
        weighted = tile_weighted;
      }
      top = tile_top;
    }
    const at::Tensor blind = sum == 0;
    rows_of(result.out_MRV, b, p).copy_(weighted.div_(sum.masked_fill(blind, 1)));
    rows_of(result.lse_MR1, b, p).copy_(top.add_(sum.log()).masked_fill_(blind, -kInfinity));
  });
  return result;
}

PanelGrads panel_backward(const Panel& p, const at::Tensor& grad_out, const at::Tensor& lse,
                          const at::Tensor& delta) {
  const at::ScalarType operand = p.q_MRK.scalar_type(), wide = wide_of(operand);
  const auto options = p.q_MRK.options().dtype(wide);
  PanelGrads grads{at::zeros(p.q_MRK.sizes(), options), at::zeros(p.k_MSK.sizes(), options),
                   at::zeros(p.v_MSV.sizes(), options)};
  const std::int64_t columns = columns_of(p);
  for_each_block(p, [&](const Block& b) {
    const at::Tensor q = block_queries(p, b, operand), go = rows_of(grad_out, b, p);
    const at::Tensor l = rows_of(lse, b, p), along = rows_of(delta, b, p);
    const std::int64_t place = p.keys() - p.queries() + b.query;
    const at::Tensor to_q = rows_of(grads.q_MRK, b, p);
    for (std::int64_t s = 0; s < b.keys; s += columns) {
      const std::int64_t count = std::min(columns, b.keys - s);
      const at::Tensor k = block_keys(p, b, s, count, operand), v = keys_of(p.v_MSV, b, s, count);
      const at::Tensor weight = make_scores(p, b, q, k, s, wide).sub_(l).exp_();
      const at::Tensor slope =
          product(go, v.mT(), wide).sub_(along).mul_(weight).mul_(p.scale).to(operand);
      keys_of(grads.v_MSV, b, s, count).add_(product(weight.to(operand).mT(), go, wide));
      at::Tensor dk = product(slope.mT(), q, wide);
      if (p.fade != nullptr) dk.mul_(powers(p, s, count, place, -1));
      keys_of(grads.k_MSK, b, s, count).add_(dk);
      to_q.add_(product(slope, k, wide));
    }
    if (p.fade != nullptr)
      to_q.mul_(powers(p, place, b.queries, place, 1).repeat_interleave(p.group, 0));
  });
  return grads;
}

}  // namespace everlong::longnet
