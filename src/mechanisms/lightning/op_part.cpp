#include "mechanisms/lightning/op_part.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::lightning {
namespace {

using at::Tensor;

// x [A G R, n, D] times a table that broadcasts over [A, G, R, n, 1].
Tensor weigh(const Tensor& x, const Tensor& table, const Part& p) {
  return x.view({p.rows(), p.heads(), p.ranks(), p.chunk(), -1}).mul(table).view(x.sizes());
}

// (a b^T) .* mask, [A G R, n, n]
Tensor masked_scores(const Tensor& a, const Tensor& b, const Part::Decays& d, const Part& p) {
  const Tensor scores = at::bmm(a, b.mT());
  scores.view({p.rows(), p.heads(), p.ranks(), p.chunk(), p.chunk()}).mul_(d.mask_G1nn);
  return scores;
}

struct Scan {
  Tensor at_chunk;  // [A G R, K, V]: what reaches each chunk from outside it
  Tensor carried;   // [A, G, K, V]: what leaves the block
};

// Carries `state` [A, G, K, V] through the chunks whose own contributions are `own` [A G R, K, V];
// `back`: from the last chunk to the first. Sums of decayed terms only. The state itself moves by
// what it loses, expm1, so a decay of 4e-8 a token is not rounded away however short the pieces.
Scan scan(const Tensor& own, const Tensor& state, const Part::Decays& d, const Part& p, bool back) {
  const std::int64_t K = own.size(1), V = own.size(2), R = p.ranks();
  if (R == 1) {
    const Tensor change = own.view(state.sizes()).addcmul(state, d.lost_AG11);
    return {state.reshape({-1, K, V}), change.add_(state)};
  }
  const Tensor parts = own.view({p.rows() * p.heads(), R, K * V});
  const Tensor inside = at::bmm(back ? d.between_BRR.mT() : d.between_BRR, parts);
  const auto last = [&](const Tensor& x) {
    return x.select(1, back ? 0 : R - 1).view(state.sizes());
  };
  const Tensor change = last(parts).addcmul(last(inside), d.chunk_G11).addcmul_(state, d.lost_AG11);
  inside.view({p.rows(), p.heads(), R, K * V})
      .addcmul_(state.reshape({p.rows(), p.heads(), 1, K * V}),
                back ? d.chunks_GR1.flip(1) : d.chunks_GR1);
  return {inside.view({-1, K, V}), change.add_(state)};
}

}  // namespace

Part::Part(const Job& job, const Block& block, std::int64_t first_head)
    : job_(job),
      block_(block),
      first_head_(first_head),
      heads_(std::min(job.head_group, job.heads - first_head)) {}

Tensor Part::slots() const {
  return job_.slots.narrow(0, block_.first, rows() * ranks() * chunk())
      .view({rows(), 1, ranks(), chunk()});
}
Tensor Part::head_index() const { return job_.head_index.narrow(1, 0, heads_); }
Tensor Part::states(const Tensor& all) const {
  return all.narrow(0, block_.row, rows()).narrow(1, first_head_, heads_);
}

Tensor Part::load(const Tensor& x) const {
  const Tensor mine = x.narrow(2, first_head_, heads_);
  const std::int64_t dim = x.size(3);
  const auto dtype = c10::typeMetaToScalarType(job_.options.dtype());
  if (!job_.plan.packed()) {
    const Tensor view = mine.narrow(0, block_.row, rows())
                            .narrow(1, block_.first, ranks() * chunk())
                            .view({rows(), ranks(), chunk(), heads_, dim})
                            .permute({0, 3, 1, 2, 4});
    if (x.scalar_type() == dtype) return view.reshape({-1, chunk(), dim});
    return at::empty(view.sizes(), job_.options).copy_(view).view({-1, chunk(), dim});
  }
  Tensor slots = this->slots(), padding;
  if (!block_.length.empty()) {
    padding = slots.eq(x.size(1));
    slots = slots.clamp_max(x.size(1) - 1);
  }
  const Tensor out = at::index(mine.select(0, 0), {slots, head_index()}).to(dtype);
  if (padding.defined()) out.masked_fill_(padding.unsqueeze(-1), 0);
  return out.view({-1, chunk(), dim});
}

void Part::store(const Tensor& value, const Tensor& out) const {
  const Tensor mine = out.narrow(2, first_head_, heads_);
  const std::int64_t dim = out.size(3);
  const Tensor v = value.view({rows(), heads_, ranks(), chunk(), dim});
  if (job_.plan.packed()) {
    mine.select(0, 0).index_put_({slots(), head_index()}, v.to(out.scalar_type()));
    return;
  }
  mine.narrow(0, block_.row, rows())
      .narrow(1, block_.first, ranks() * chunk())
      .view({rows(), ranks(), chunk(), heads_, dim})
      .copy_(v.permute({0, 2, 3, 1, 4}));
}

Part::Decays Part::decays() const {
  const DecayTables& t = job_.tables();
  const auto mine = [&](const Tensor& table) { return table.narrow(0, first_head_, heads_); };
  Decays d;
  d.mask_G1nn = mine(t.mask_H1nn).narrow(2, 0, chunk()).narrow(3, 0, chunk());
  d.from_start = mine(t.from_start_H1n1).narrow(2, 0, chunk());
  d.to_end_G1n1 = mine(t.to_end_H1n1).narrow(2, t.chunk - chunk(), chunk());
  if (!block_.length.empty()) {
    const Tensor length = at::tensor(block_.length, at::kLong).to(job_.options.device());
    const Tensor token =
        (at::arange(chunk(), length.options()) - (chunk() - length.unsqueeze(1))).clamp_min(0);
    d.from_start = mine(t.from_start_H1n1)
                       .reshape({heads_, -1})
                       .index_select(1, token.view(-1))
                       .view({heads_, rows(), 1, chunk(), 1})
                       .transpose(0, 1);
    d.lost_AG11 = mine(t.lost_in_tokens_Hm).index_select(1, length).t().unsqueeze(-1).unsqueeze(-1);
  } else if (ranks() == 1) {
    d.lost_AG11 = mine(t.lost_in_tokens_Hm).select(1, chunk()).reshape({1, heads_, 1, 1});
  } else {
    d.lost_AG11 = mine(t.lost_in_chunks_Hr).select(1, ranks()).reshape({1, heads_, 1, 1});
    d.between_BRR = mine(t.between_HRR)
                        .narrow(1, 0, ranks())
                        .narrow(2, 0, ranks())
                        .expand({rows(), heads_, ranks(), ranks()})
                        .reshape({-1, ranks(), ranks()});
    d.chunks_GR1 = mine(t.chunks_HR1).narrow(1, 0, ranks());
    d.chunk_G11 = mine(t.chunks_HR1).narrow(1, 1, 1);
  }
  return d;
}

void forward_part(const Part& p, const Inputs& in, const Tensor& states, const Tensor& out) {
  const Part::Decays d = p.decays();
  const Tensor q = p.load(in.q), k = p.load(in.k), v = p.load(in.v), state = p.states(states);
  const Tensor o = at::bmm(masked_scores(q, k, d, p), v);
  const Scan next = scan(at::bmm(weigh(k, d.to_end_G1n1, p).mT(), v), state, d, p, /*back=*/false);
  o.baddbmm_(weigh(q, d.from_start, p), next.at_chunk);
  state.copy_(next.carried);  // at_chunk may be a view of it: only now
  p.store(o, out);
}

void backward_part(const Part& p, const Inputs& in, const Tensor& grad_o, const Tensor& before,
                   const Tensor& reverse, const Gradients& out) {
  const Part::Decays d = p.decays();
  const Tensor q = p.load(in.q), k = p.load(in.k), v = p.load(in.v), g = p.load(grad_o),
               R = p.states(reverse);
  const Tensor weighed_k = weigh(k, d.to_end_G1n1, p), weighed_g = weigh(g, d.from_start, p);
  const Tensor S = scan(at::bmm(weighed_k.mT(), v), before, d, p, /*back=*/false).at_chunk;
  const Scan after = scan(at::bmm(q.mT(), weighed_g), R, d, p, /*back=*/true);

  const Tensor dv = at::bmm(masked_scores(q, k, d, p).mT(), g);
  dv.baddbmm_(weighed_k, after.at_chunk);
  p.store(dv, out.v);
  const Tensor grad_scores = masked_scores(g, v, d, p);
  const Tensor dq = at::bmm(grad_scores, k);
  dq.baddbmm_(weighed_g, S.mT());
  p.store(dq, out.q);
  const Tensor dk = at::bmm(grad_scores.mT(), q);
  dk.baddbmm_(weigh(v, d.to_end_G1n1, p), after.at_chunk.mT());
  p.store(dk, out.k);
  R.copy_(after.carried);
}

}  // namespace everlong::lightning
