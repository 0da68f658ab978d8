#include "mechanisms/infini/op.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "mechanisms/infini/op_cpu.h"
#include "mechanisms/infini/op_parts.h"
#include "mechanisms/infini/op_scan.h"
#include "ops/causal_attention.h"

namespace everlong::infini {
namespace {

// Below it a divisor counts as nothing: its reciprocal must stay finite.
double smallest_divisor(at::ScalarType dtype) { return dtype == at::kDouble ? 1e-290 : 1e-30; }

// What segments write: rows [B, S C, G, D] and weights [B, S C], undefined for ones.
struct Writes {
  at::Tensor phi;       // sigma(k), [B, S, G, C, K]; zero where the weight is
  at::Tensor weighted;  // weight times phi
  at::Tensor v;         // [B, S, G, C, V]
  at::Tensor weight;    // [B, S, 1, C, 1] or undefined
};

Writes prepare(const at::Tensor& k, const at::Tensor& v, const at::Tensor& weight, std::int64_t C,
               at::ScalarType wide) {
  const auto by_segment = [&](const at::Tensor& x) {
    return x.unflatten(1, {x.size(1) / C, C}).transpose(2, 3).to(wide);
  };
  Writes w{sigma(by_segment(k)), {}, by_segment(v), {}};
  w.weighted = w.phi;
  if (!weight.defined()) return w;
  w.weight = weight.unflatten(1, {weight.size(1) / C, C}).unsqueeze(2).unsqueeze(-1).to(wide);
  const at::Tensor never = w.weight == 0;
  w.phi = w.phi.masked_fill(never, 0);  // filled, not multiplied: a NaN must not get through
  w.v = w.v.masked_fill(never, 0);
  w.weighted = w.phi * w.weight;
  return w;
}

// gamma of every token, [B, S, G, C, 1]: z is needed before each segment, one after the other. No
// gradient.
at::Tensor shares_of_z(const Writes& w, const at::Tensor& z0) {
  const at::NoGradGuard constant;
  at::Tensor z = z0;
  std::vector<at::Tensor> shares;
  for (std::int64_t s = 0; s < w.phi.size(1); ++s) {
    const at::Tensor phi = w.phi.select(1, s);  // [B, G, C, K]
    const at::Tensor norm = phi.square().sum(-1, true);
    const at::Tensor known = at::matmul(phi, z.unsqueeze(-1)) / norm.masked_fill(norm == 0, 1);
    shares.push_back((1 - known).clamp(0, 1));
    z = z + (w.weighted.select(1, s) * shares.back()).sum(2);
  }
  return at::stack(shares, 1);
}

struct States {
  at::Tensor M, z;  // [B, S + 1, G, K, V], [B, S + 1, G, K]: before each segment, after the last
};

States scan_memory(const Writes& w, const at::Tensor& M0, const at::Tensor& z0,
                   const Options& options, const std::vector<std::int64_t>& cut) {
  at::Tensor to_z = w.weighted;
  if (options.delta_z == DeltaZ::kArmt) to_z = to_z * shares_of_z(w, z0);
  const at::Tensor z = scan_segments(z0, to_z.sum(3), {}, cut);
  const at::Tensor add = at::matmul(w.weighted.mT(), w.v);
  if (options.update == Update::kLinear) return {scan_segments(M0, add, {}, cut), z};
  // A = sum_t w phi^T phi / den; what an empty memory answers is nothing.
  const at::Tensor den = at::matmul(w.phi, z.narrow(1, 0, z.size(1) - 1).unsqueeze(-1));
  const at::Tensor nothing = den.abs() < smallest_divisor(den.scalar_type());
  const at::Tensor share = w.weighted / den.masked_fill(nothing, 1);
  const at::Tensor take = at::matmul(share.masked_fill(nothing, 0).mT(), w.phi);
  return {scan_segments(M0, add, take, cut), z};
}

// The same for the linear rule by the CPU kernel: rows [B, S C, G, D], weights [B, S C] or
// undefined.
States scan_by_cpu_kernel(const at::Tensor& k, const at::Tensor& v, const at::Tensor& weight,
                          std::int64_t C, const at::Tensor& M0, const at::Tensor& z0,
                          const std::vector<std::int64_t>& cut) {
  const std::int64_t B = k.size(0), S = k.size(1) / C;
  const auto fold = [&](const at::Tensor& x) {
    return x.defined() ? x.unflatten(1, {S, C}).flatten(0, 1) : x;
  };
  const auto [M, z] = write_by_cpu_kernel(fold(k), fold(v), fold(weight));
  return {scan_segments(M0, M.unflatten(0, {B, S}), {}, cut),
          scan_segments(z0, z.unflatten(0, {B, S}), {}, cut)};
}

// The slot form: weights p_i = sigma(q)_i z_i / sum over the mean values M_i / z_i. Nothing here
// can overflow, and no gradient divides by a small sum. -> [B, T, H, V]
at::Tensor read_memory(const at::Tensor& q_BTHK, const at::Tensor& M, const at::Tensor& z) {
  const std::int64_t G = M.size(1), H = q_BTHK.size(2), T = q_BTHK.size(1);
  const at::Tensor phi = sigma(q_BTHK.to(M.scalar_type()))
                             .unflatten(2, {G, H / G})
                             .permute({0, 2, 1, 3, 4})
                             .flatten(2, 3);  // [B, G, T R, K]
  const at::Tensor mass = phi * z.unsqueeze(2), sum = mass.sum(-1, true);
  const at::Tensor nothing = sum.abs() < smallest_divisor(sum.scalar_type());
  const at::Tensor p = (mass / sum.masked_fill(nothing, 1)).masked_fill(nothing, 0);
  const at::Tensor bare = (z == 0).unsqueeze(-1);
  const at::Tensor means = (M / z.unsqueeze(-1).masked_fill(bare, 1)).masked_fill(bare, 0);
  return at::matmul(p, means).unflatten(2, {T, H / G}).permute({0, 2, 1, 3, 4}).flatten(2, 3);
}

// Everything that the pieces of one call share.
struct Call {
  const at::Tensor& gate;  // [1 or H, 1 or V]; undefined: memory alone
  const Options& options;
  const Turns& turns;
  bool kernel;  // the CPU kernels, or ATen operations

  // Some tokens q [B, t, H, K] at the end of the rows k [B, u, G, K], v of their segment, u >= t.
  // M, z: the memory before it, or undefined.
  at::Tensor outputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& M, const at::Tensor& z) const {
    const std::int64_t first = k.size(1) - q.size(1);
    at::Tensor local;
    if (gate.defined()) {
      local = causal_attention(turns.turn(q, first), turns.turn(k, 0), v,
                               scale_of(options, q.size(3)), kernel);
      if (!M.defined() || !options.read)
        return options.empty == Empty::kBypass ? local : ((1 - gate) * local).to(q.scalar_type());
    } else if (!M.defined() || !options.read) {
      return at::zeros({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
    }
    if (kernel && gate.defined())
      return read_by_cpu_kernel(q, local, M, z, gate.expand({q.size(2), v.size(3)}),
                                options.empty == Empty::kBypass);
    const at::Tensor mem = read_memory(q, M, z);
    if (!gate.defined()) return mem.to(q.scalar_type());
    const at::Tensor mixed = gate * mem + (1 - gate) * local;
    if (options.empty == Empty::kZero) return mixed.to(q.scalar_type());
    const at::Tensor empty =
        (z == 0).all(-1).repeat_interleave(q.size(2) / z.size(1), 1).unsqueeze(1).unsqueeze(-1);
    return at::where(empty, local.to(mixed.scalar_type()), mixed).to(q.scalar_type());
  }
};

bool takes_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Path path) {
  if (path == Path::kComposite) return false;
  const Status status = check_cpu_kernel(q, k, v);
  if (path == Path::kCpu) throw_if_error(status);
  return status.ok();
}

at::Tensor joined(const at::Tensor& open, const at::Tensor& fresh) {
  return open.defined() && open.size(1) > 0 ? at::cat({open.to(fresh.scalar_type()), fresh}, 1)
                                            : fresh;
}

}  // namespace

at::Tensor sigma(const at::Tensor& x) { return at::where(x > 0, x + 1, x.clamp_max(0).exp()); }

at::Tensor gate_of(const at::Tensor& beta, std::int64_t heads, const Options& options,
                   at::ScalarType dtype) {
  if (!beta.defined()) return beta;
  const at::Tensor wide = beta.to(dtype);
  const at::Tensor g =
      options.gate == Gate::kHardSigmoid ? (wide / 6 + 0.5).clamp(0, 1) : at::sigmoid(wide);
  return g.numel() == 1 ? g.view({1, 1}) : g.view({heads, g.numel() / heads});
}

std::string_view path_taken(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            Path path) {
  return takes_cpu_kernel(q, k, v, path) ? "cpu" : "composite";
}

at::Tensor attend_open_segment(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& beta, const at::Tensor& M, const at::Tensor& z,
                               const Options& options, Path path) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Turns turns(options, q.size(3), k.size(1), q);
  const at::Tensor gate = gate_of(beta, q.size(2), options, wide);
  return Call{gate, options, turns, takes_cpu_kernel(q, k, v, path)}.outputs(q, k, v, M, z);
}

Mixed infini_attention(const at::Tensor& q, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                       const at::Tensor& beta, const at::Tensor& weight_BT, const Carried& before,
                       const Options& options, Path path) {
  check_tensors(q, k_BTGK, v_BTGV, beta, weight_BT, before, options);
  const std::int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3),
                     C = options.segment, G = k_BTGK.size(2), V = v_BTGV.size(3), F = before.open();
  const at::ScalarType wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor k = joined(before.k_NFGK, k_BTGK), v = joined(before.v_NFGV, v_BTGV);
  at::Tensor weight = joined_weights(before.weight_NF, weight_BT, B, F, T);
  const std::int64_t rows = F + T, whole = rows / C;
  const std::int64_t closed = options.commit_last ? (rows + C - 1) / C : whole;

  const bool kernel = takes_cpu_kernel(q, k_BTGK, v_BTGV, path);
  States states{before.M_NGKV, before.z_NGK};
  if (closed > 0) {
    at::Tensor M0 = before.M_NGKV, z0 = before.z_NGK;
    if (!M0.defined()) {
      M0 = at::zeros({B, G, K, V}, q.options().dtype(wide));
      z0 = at::zeros({B, G, K}, M0.options());
    }
    const auto closing = [&](const at::Tensor& x, std::vector<std::int64_t> behind) {
      if (!x.defined() || closed * C <= rows) return x.defined() ? x.narrow(1, 0, closed * C) : x;
      behind.push_back(closed * C - rows);
      return at::constant_pad_nd(x, behind);
    };
    if (closed * C > rows && !weight.defined()) weight = at::ones({B, rows}, M0.options());
    const at::Tensor rows_k = closing(k, {0, 0, 0, 0, 0}), rows_v = closing(v, {0, 0, 0, 0, 0}),
                     rows_w = closing(weight.defined() ? weight.detach() : weight, {0});
    std::vector<std::int64_t> cut;
    for (std::int64_t s = 0; s <= closed; ++s)
      cut.push_back(is_cut(options, before.segment_number + s) ? 1 : 0);
    states = kernel && options.update == Update::kLinear
                 ? scan_by_cpu_kernel(rows_k, rows_v, rows_w, C, M0, z0, cut)
                 : scan_memory(prepare(rows_k, rows_v, rows_w, C, wide), M0, z0, options, cut);
  } else if (states.M.defined()) {
    if (is_cut(options, before.segment_number)) {
      states.M = states.M.detach();
      states.z = states.z.detach();
    }
    states.M = states.M.unsqueeze(1);
    states.z = states.z.unsqueeze(1);
  }

  // Tokens that go on with the open segment, whole segments, and those that open a new one.
  const Turns turns(options, K, std::min(rows, C), q);
  const at::Tensor gate = gate_of(beta, H, options, wide);
  const Call call{gate, options, turns, kernel};
  const std::int64_t head = F > 0 ? std::min(C - F, T) : 0, middle = (T - head) / C,
                     first = F > 0 ? 1 : 0, tail = T - head - middle * C;
  const auto memory_at = [&](const at::Tensor& all, std::int64_t s, std::int64_t count) {
    // The first segment of a text has nothing to read.
    if (!all.defined() || count == 0 || (!before.M_NGKV.defined() && s + count == 1))
      return at::Tensor();
    return all.narrow(1, s, count).flatten(0, 1);
  };
  std::vector<at::Tensor> parts;
  if (head > 0)
    parts.push_back(call.outputs(q.narrow(1, 0, head), k.narrow(1, 0, F + head),
                                 v.narrow(1, 0, F + head), memory_at(states.M, 0, 1),
                                 memory_at(states.z, 0, 1)));
  if (middle > 0) {
    const auto fold = [&](const at::Tensor& x, std::int64_t begin) {
      return x.narrow(1, begin, middle * C).unflatten(1, {middle, C}).flatten(0, 1);
    };
    parts.push_back(call.outputs(fold(q, head), fold(k, F + head), fold(v, F + head),
                                 memory_at(states.M, first, middle),
                                 memory_at(states.z, first, middle))
                        .unflatten(0, {B, middle})
                        .flatten(1, 2));
  }
  if (tail > 0 || parts.empty())
    parts.push_back(call.outputs(
        q.narrow(1, T - tail, tail), k.narrow(1, rows - tail, tail), v.narrow(1, rows - tail, tail),
        memory_at(states.M, first + middle, std::min<std::int64_t>(tail, 1)),
        memory_at(states.z, first + middle, std::min<std::int64_t>(tail, 1))));
  Mixed mixed{parts.size() == 1 ? parts.front() : at::cat(parts, 1), {}};
  mixed.after = carried_on(before, k, v, weight, closed, options);
  if (states.M.defined()) {
    mixed.after.M_NGKV = states.M.select(1, closed).clone();
    mixed.after.z_NGK = states.z.select(1, closed).clone();
  }
  return mixed;
}

}  // namespace everlong::infini
