#include <ATen/ATen.h>

#include <limits>

#include "mechanisms/infini/op_parts.h"

namespace everlong::infini {

Mixed naive(const at::Tensor& q, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
            const at::Tensor& beta, const at::Tensor& weight_BT, const Carried& before,
            const Options& options) {
  check_tensors(q, k_BTGK, v_BTGV, beta, weight_BT, before, options);
  const std::int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), F = before.open(),
                     G = k_BTGK.size(2), V = v_BTGV.size(3), C = options.segment, rows = F + T;
  const auto dtype = q.scalar_type();
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto join = [&](const at::Tensor& open, const at::Tensor& fresh) {
    return F > 0 ? at::cat({open.to(dtype), fresh}, 1) : fresh;
  };
  const at::Tensor k = join(before.k_NFGK, k_BTGK), v = join(before.v_NFGV, v_BTGV);
  at::Tensor weight = joined_weights(before.weight_NF, weight_BT, B, F, T);
  if (!weight.defined()) weight = at::ones({B, rows}, q.options().dtype(wide));
  at::Tensor M = before.M_NGKV, z = before.z_NGK;
  if (!M.defined()) {
    M = at::zeros({B, G, K, V}, q.options().dtype(wide));
    z = at::zeros({B, G, K}, M.options());
  }
  const at::Tensor gate = gate_of(beta, H, options, wide);
  const Turns turns(options, K, C, q);
  const auto grouped = [&](const at::Tensor& x) { return x.repeat_interleave(H / G, 1); };
  const auto wide_options = q.options().dtype(wide);
  std::vector<at::Tensor> mems = {at::zeros({B, 0, H, V}, wide_options)}, locals = mems,
                          bypassed = {at::zeros({B, 0, H, 1}, q.options().dtype(at::kBool))};
  std::int64_t closed = 0;
  for (std::int64_t begin = 0; begin < rows; begin += C) {
    if (is_cut(options, before.segment_number + begin / C)) {
      M = M.detach();
      z = z.detach();
    }
    const std::int64_t count = std::min(C, rows - begin), from = std::max(begin, F),
                       asked = begin + count - from;
    const at::Tensor ks = k.narrow(1, begin, count), vs = v.narrow(1, begin, count),
                     qs = q.narrow(1, from - F, asked);
    const at::Tensor empty = (z == 0).all(-1);  // [B, G]
    const auto answer = [&](const at::Tensor& phi, const at::Tensor& m, const at::Tensor& mass,
                            const at::Tensor& none) {
      const at::Tensor den = at::matmul(phi, mass.unsqueeze(-1));
      // Of an empty memory, or for a token that is never written (its features are zero).
      const at::Tensor nothing = none.unsqueeze(-1).unsqueeze(-1).logical_or(den == 0);
      return (at::matmul(phi, m) / den.masked_fill(nothing, 1)).masked_fill(nothing, 0);
    };
    const at::Tensor phi_q = sigma(qs).transpose(1, 2).to(wide);
    const at::Tensor mem = answer(phi_q, grouped(M), grouped(z), grouped(empty)).transpose(1, 2);
    if (gate.defined()) {
      const at::Tensor scores = at::matmul(turns.turn(qs, from - begin).transpose(1, 2),
                                           grouped(turns.turn(ks, 0).transpose(1, 2)).mT()) *
                                scale_of(options, K);
      const auto integers = q.options().dtype(at::kLong);
      const at::Tensor future =
          at::arange(count, integers) > at::arange(from - begin, count, integers).unsqueeze(1);
      const at::Tensor p =
          at::softmax(scores.masked_fill(future, -std::numeric_limits<double>::infinity()), -1);
      const at::Tensor local = at::matmul(p, grouped(vs.transpose(1, 2))).transpose(1, 2);
      locals.push_back(local.to(wide));
      const bool bypass = options.empty == Empty::kBypass;
      bypassed.push_back((bypass ? grouped(empty) : at::zeros_like(grouped(empty)))
                             .view({B, 1, H, 1})
                             .expand({B, asked, H, 1}));
    }
    mems.push_back(mem);
    if (count < C && !options.commit_last) break;
    const at::Tensor w = weight.narrow(1, begin, count).unsqueeze(1).unsqueeze(-1);
    const at::Tensor never = w == 0;
    const at::Tensor phi = sigma(ks).transpose(1, 2).to(wide).masked_fill(never, 0);
    at::Tensor e = vs.transpose(1, 2).to(wide).masked_fill(never, 0);
    if (options.update == Update::kDelta) e = e - answer(phi, M, z, empty).masked_fill(never, 0);
    at::Tensor share = at::ones_like(w);
    if (options.delta_z == DeltaZ::kArmt) {
      const at::Tensor norm = phi.square().sum(-1, true);
      share = (1 - at::matmul(phi, z.unsqueeze(-1)) / norm.masked_fill(norm == 0, 1))
                  .clamp(0, 1)
                  .detach();
    }
    M = M + at::matmul((phi * w).mT(), e);
    z = z + (phi * w * share).sum(2);
    ++closed;
  }
  if (is_cut(options, before.segment_number + closed)) {
    M = M.detach();
    z = z.detach();
  }
  at::Tensor out = at::cat(mems, 1);
  if (gate.defined()) {
    const at::Tensor local = at::cat(locals, 1);
    out = at::where(at::cat(bypassed, 1), local, gate * out + (1 - gate) * local);
  }
  Mixed mixed{out.to(dtype), carried_on(before, k, v, weight, closed, options)};
  mixed.after.M_NGKV = M.clone();
  mixed.after.z_NGK = z.clone();
  return mixed;
}

}  // namespace everlong::infini
