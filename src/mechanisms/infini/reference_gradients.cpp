// The gradient by hand. One walk over the segments from the last to the first, carrying
// G = dL/dM and h = dL/dz of the memory that leaves the segment.
#include <algorithm>

#include "mechanisms/infini/reference_parts.h"

namespace everlong::infini::reference {
namespace {

double slope(const Problem& p, double x) {
  // A feature of a test is the identity.
  return p.feature != nullptr ? 1 : std::exp(std::min(x, 0.0));
}

// The memory before every segment and after the last.
struct History {
  std::vector<Vector> M, z;
};
History history(const Problem& p) {
  History all{{p.M}, {p.z}};
  for (std::int64_t s = 0; s < p.closed(); ++s) {
    Problem one = p;  // the stream up to the end of segment s, without its queries
    const std::int64_t end = std::min((s + 1) * p.options.segment, p.rows());
    one.tokens = 0;
    one.open = end;
    one.options.commit_last = true;
    const Answer a = stream(one);
    all.M.push_back(a.M);
    all.z.push_back(a.z);
  }
  return all;
}

struct Walk {
  const Problem& p;
  const Vector phi_q, phi_k;
  Gradients d;
  Vector dphi_q, dphi_k;  // with respect to the features
  Vector G, h;
  std::int64_t K, V;

  explicit Walk(const Problem& problem)
      : p(problem),
        phi_q(features(p, p.q)),
        phi_k(features(p, p.k)),
        d{Vector(p.q.size()),    Vector(p.k.size()), Vector(p.v.size()),
          Vector(p.gate.size()), Vector(p.M.size()), Vector(p.z.size())},
        dphi_q(p.q.size()),
        dphi_k(p.k.size()),
        G(p.M.size()),
        h(p.z.size()),
        K(p.key_dim),
        V(p.value_dim) {}

  // Of the tokens that segment s wrote; M and z before it. G and h become those of M and z.
  void write(std::int64_t s, const Vector& M, const Vector& z) {
    Vector G_before = G, h_before = h;
    const std::int64_t begin = s * p.options.segment,
                       end = std::min(begin + p.options.segment, p.rows());
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t g = 0; g < p.kv_heads && p.weight[row] != 0; ++g) {
        const double *phi = &phi_k[at_k(p, row, g)], *m = &M[g * K * V], *mass = &z[g * K];
        double* dphi = &dphi_k[at_k(p, row, g)];
        const double w = p.weight[row], share = share_of_z(p, phi, mass);
        Vector e(&p.v[at_v(p, row, g)], &p.v[at_v(p, row, g)] + V);
        double den = 1;
        Vector known(static_cast<std::size_t>(V));
        const bool subtracts = p.options.update == Update::kDelta && !is_empty(mass, K);
        if (subtracts) known = retrieve(phi, m, mass, K, V, &den);
        add_scaled(-1, known.data(), e.data(), V);
        Vector y(static_cast<std::size_t>(V));  // sigma(k) G
        for (std::int64_t i = 0; i < K; ++i) add_scaled(phi[i], &G[(g * K + i) * V], y.data(), V);
        add_scaled(w, y.data(), &d.v[at_v(p, row, g)], V);
        for (std::int64_t i = 0; i < K; ++i)
          dphi[i] += w * dot(e.data(), &G[(g * K + i) * V], V) + w * share * h[g * K + i];
        if (!subtracts) continue;
        Vector u = y;
        for (double& x : u) x *= -w / den;
        const double c = -dot(u.data(), known.data(), V);
        for (std::int64_t i = 0; i < K; ++i) {
          dphi[i] += dot(m + i * V, u.data(), V) + c * mass[i];
          add_scaled(phi[i], u.data(), &G_before[(g * K + i) * V], V);
        }
        add_scaled(c, phi, &h_before[g * K], K);
      }
    G = G_before;
    h = h_before;
  }

  // Of the tokens that read M and z; adds what they ask of the memory to G and h, and returns the
  // gradients of the local attention, to `local`.
  void read(std::int64_t s, const Vector& M, const Vector& z, std::span<const double> grad_out,
            const Vector& dots, Vector& local) {
    const std::int64_t C = p.options.segment;
    for (std::int64_t row = std::max(s * C, p.open); row < std::min((s + 1) * C, p.rows()); ++row)
      for (std::int64_t head = 0; head < p.heads; ++head) {
        const std::int64_t t = row - p.open, g = head / p.group(), o = at_o(p, t, head);
        const double *phi = &phi_q[at_q(p, t, head)], *m = &M[g * K * V], *mass = &z[g * K];
        const bool empty = is_empty(mass, K);
        double den = 1;
        const Vector mem = retrieve(phi, m, mass, K, V, &den);
        const bool bypass = empty && p.options.empty == Empty::kBypass;
        Vector u(static_cast<std::size_t>(V));
        for (std::int64_t c = 0; c < V; ++c) {
          const double gate = p.gate[head * V + c], go = grad_out[o + c];
          local[o + c] = bypass ? go : (1 - gate) * go;
          if (!bypass) d.gate[head * V + c] += go * (mem[c] - dots[o + c]);
          if (!empty) u[c] = gate * go / den;
        }
        if (empty) continue;
        const double along = dot(u.data(), mem.data(), V);
        for (std::int64_t i = 0; i < K; ++i) {
          dphi_q[at_q(p, t, head) + i] += dot(m + i * V, u.data(), V) - along * mass[i];
          add_scaled(phi[i], u.data(), &G[(g * K + i) * V], V);
          h[g * K + i] -= along * phi[i];
        }
      }
  }

  // Of the local attention, on turned queries and keys, then turned back.
  void local(const Vector& grad, const Vector& dots) {
    const Vector q = rotate(p, p.q, p.heads, p.open), k = rotate(p, p.k, p.kv_heads, 0);
    Vector dq(q.size()), dk(k.size());
    const double scale = scale_of(p.options, K);
    for (std::int64_t t = 0; t < p.tokens; ++t)
      for (std::int64_t head = 0; head < p.heads; ++head) {
        const std::int64_t g = head / p.group(), o = at_o(p, t, head);
        const double along = dot(&grad[o], &dots[o], V);
        const Vector w = local_weights(p, q, k, t, head);
        for (std::size_t j = 0; j < w.size(); ++j) {
          const auto row = segment_begin(p, p.open + t) + static_cast<std::int64_t>(j);
          const double ds = scale * w[j] * (dot(&grad[o], &p.v[at_v(p, row, g)], V) - along);
          add_scaled(ds, &k[at_k(p, row, g)], &dq[at_q(p, t, head)], K);
          add_scaled(ds, &q[at_q(p, t, head)], &dk[at_k(p, row, g)], K);
          add_scaled(w[j], &grad[o], &d.v[at_v(p, row, g)], V);
        }
      }
    d.q = rotate(p, dq, p.heads, p.open, -1);
    d.k = rotate(p, dk, p.kv_heads, 0, -1);
  }
};

}  // namespace

Gradients gradients(const Problem& p, std::span<const double> grad_out,
                    std::span<const double> grad_M, std::span<const double> grad_z) {
  Walk walk(p);
  const History past = history(p);
  const Vector dots = local_attention(p);
  Vector zeros(dots.size()), local_grad(dots.size());
  if (grad_out.empty()) grad_out = zeros;
  if (!grad_M.empty()) walk.G.assign(grad_M.begin(), grad_M.end());
  if (!grad_z.empty()) walk.h.assign(grad_z.begin(), grad_z.end());
  const auto cut = [&](std::int64_t s) {
    const std::int64_t number = p.first_segment + s, every = p.options.bptt_segments;
    if (every == 0 || number == 0 || number % every != 0) return;
    std::ranges::fill(walk.G, 0);
    std::ranges::fill(walk.h, 0);
  };
  const std::int64_t closed = p.closed();
  // The memory after the last closed segment is read by an open one, if there is one.
  walk.read(closed, past.M.back(), past.z.back(), grad_out, dots, local_grad);
  cut(closed);
  for (std::int64_t s = closed - 1; s >= 0; --s) {
    walk.write(s, past.M[s], past.z[s]);
    walk.read(s, past.M[s], past.z[s], grad_out, dots, local_grad);
    cut(s);
  }
  walk.local(local_grad, dots);
  Gradients& d = walk.d;
  for (std::size_t i = 0; i < p.q.size(); ++i) d.q[i] += walk.dphi_q[i] * slope(p, p.q[i]);
  for (std::size_t i = 0; i < p.k.size(); ++i) d.k[i] += walk.dphi_k[i] * slope(p, p.k[i]);
  d.M = walk.G;
  d.z = walk.h;
  return d;
}

}  // namespace everlong::infini::reference
