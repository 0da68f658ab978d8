#include <ATen/ATen.h>

#include "mechanisms/longnet/op.h"

namespace everlong::longnet {
namespace {

// One pattern: scores [B, G, R, T, S] (-inf: not seen) and values [B, G, 1, S, V].
struct Seen {
  at::Tensor scores, values;
};

Seen look(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Geometry& geometry,
          std::size_t i, double scale, const Past& past) {
  const auto [w, r] = geometry.patterns[i];
  const std::int64_t B = q.size(0), T = q.size(1), G = k.size(2), R = q.size(2) / G;
  const auto integers = q.options().dtype(at::kLong);
  std::vector<std::int64_t> offsets;
  for (std::int64_t g = 0; g < G; ++g) offsets.push_back(offset_of(geometry.offset_rule, g, G, r));
  const at::Tensor offset = at::tensor(offsets, at::kLong).to(q.device()).view({G, 1});
  // Positions of the queries, and of the keys of each head.
  const at::Tensor place = at::arange(past.position, past.position + T, integers);
  at::Tensor key_place = place.expand({G, T});
  at::Tensor keys = k.transpose(1, 2), values = v.transpose(1, 2);
  at::Tensor real = at::ones({G, T}, integers.dtype(at::kBool));
  if (past.position > 0) {
    const std::int64_t start = (past.position - 1) / w * w, rows = past.k[i].size(2);
    const at::Tensor old = start + offset + at::arange(rows, integers) * r;
    key_place = at::cat({old, key_place}, 1);
    real = at::cat({old < past.position, real}, 1);
    keys = at::cat({past.k[i], keys}, 2);
    values = at::cat({past.v[i], values}, 2);
  }
  const at::Tensor query = place.view({1, T, 1}), key = key_place.unsqueeze(1);
  const auto segment = [w = w](const at::Tensor& p) { return p.floor_divide(w); };
  const auto aligned = [&, w = w, r = r](const at::Tensor& p) {
    return p.remainder(w).remainder(r) == offset.view({G, 1, 1});
  };
  at::Tensor seen = (segment(query) == segment(key)) & aligned(query) & aligned(key) &
                    real.unsqueeze(1) & (query >= geometry.active_from(i));
  if (geometry.causal) seen = seen & (key <= query);  // [G, T, S]
  const at::Tensor rows = q.unflatten(2, {G, R}).permute({0, 2, 3, 1, 4});
  at::Tensor scores =
      at::matmul(rows, keys.unsqueeze(2).mT())
          .mul(scale)
          .masked_fill(seen.logical_not().view({1, G, 1, T, seen.size(2)}), -kInfinity);
  values = values.unsqueeze(2);
  if (geometry.phantom) {  // one column that stands for all zero keys
    const at::Tensor zeros = (std::min(w, T) + r - 1) / r - seen.sum(-1, true);
    const at::Tensor covered = seen.any(-1, true);
    const at::Tensor bias = zeros.to(scores.scalar_type()).log().masked_fill(~covered, -kInfinity);
    scores = at::cat({scores, bias.view({1, G, 1, T, 1}).expand({B, G, R, T, 1})}, -1);
    values = at::cat({values, at::zeros_like(values.narrow(3, 0, 1))}, 3);
  }
  return {scores, values};
}

// softmax(scores) values, 0 where nothing is seen.
at::Tensor attend(const Seen& s) {
  const at::Tensor blind = (s.scores == -kInfinity).all(-1, true);
  return at::matmul(at::softmax(s.scores.masked_fill(blind, 0), -1).masked_fill(blind, 0),
                    s.values);
}

}  // namespace

at::Tensor naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const Options& options, const Past& past) {
  const double scale = options.scale.value_or(default_scale(std::max<std::int64_t>(q.size(3), 1)));
  if (q.size(1) == 0) return at::zeros({q.size(0), 0, q.size(2), v.size(3)}, v.options());
  std::vector<at::Tensor> scores, values, sums;
  std::vector<at::Tensor> outputs;
  for (std::size_t i = 0; i < options.geometry.patterns.size(); ++i) {
    const Seen s = look(q, k, v, options.geometry, i, scale, past);
    scores.push_back(s.scores);
    values.push_back(s.values);
    if (!options.geometry.detached) continue;
    outputs.push_back(attend(s));
    sums.push_back(s.scores.detach().logsumexp(-1, true));
  }
  at::Tensor out;
  if (options.geometry.detached) {
    const at::Tensor all = at::stack(sums).logsumexp(0);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      const at::Tensor mix = (sums[i] - all).exp().masked_fill(all == -kInfinity, 0);
      out = i == 0 ? outputs[i] * mix : out + outputs[i] * mix;
    }
  } else {
    out = attend({at::cat(scores, -1), at::cat(values, 3)});
  }
  return out.permute({0, 3, 1, 2, 4}).reshape({q.size(0), q.size(1), q.size(2), v.size(3)});
}

}  // namespace everlong::longnet
