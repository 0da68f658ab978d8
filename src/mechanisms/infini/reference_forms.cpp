// The other three forms. They share the local attention and the mixing with the stream, and nothing
// of how memory is written or read.
#include <algorithm>
#include <limits>

#include "mechanisms/infini/reference_parts.h"

namespace everlong::infini::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Rows [begin, end) of segment s.
struct Range {
  std::int64_t begin, end;
};
Range rows_of(const Problem& p, std::int64_t s) {
  const std::int64_t begin = s * p.options.segment;
  return {begin, std::min(begin + p.options.segment, p.rows())};
}

// z before every segment and after the last, [closed + 1] vectors of G K numbers, with the shares
// gamma of every row and head.
struct Mass {
  std::vector<Vector> before;
  Vector share;  // [rows, kv_heads]
};
Mass scan_mass(const Problem& p, const Vector& phi_k) {
  Mass mass{{p.z}, Vector(static_cast<std::size_t>(p.rows() * p.kv_heads), 1)};
  for (std::int64_t s = 0; s < p.closed(); ++s) {
    Vector z = mass.before.back();
    for (std::int64_t row = rows_of(p, s).begin; row < rows_of(p, s).end; ++row)
      for (std::int64_t g = 0; g < p.kv_heads; ++g) {
        const double* phi = &phi_k[at_k(p, row, g)];
        double& share = mass.share[row * p.kv_heads + g];
        share = share_of_z(p, phi, &mass.before.back()[g * p.key_dim]);
        if (p.weight[row] != 0)
          add_scaled(p.weight[row] * share, phi, &z[g * p.key_dim], p.key_dim);
      }
    mass.before.push_back(z);
  }
  return mass;
}

// Calls read(t, h, g, s) for every new token and head, s counting closed segments before it, and
// mixes what it returns.
template <class Read>
Vector read_all(const Problem& p, const Mass& mass, const Read& read) {
  const Vector dots = local_attention(p);
  Vector out(dots.size());
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t g = h / p.group(), s = segment_of(p, p.open + t);
      const bool empty = is_empty(&mass.before[s][g * p.key_dim], p.key_dim);
      const Vector mem = empty ? Vector(static_cast<std::size_t>(p.value_dim)) : read(t, h, g, s);
      mix(p, h, empty, mem.data(), &dots[at_o(p, t, h)], &out[at_o(p, t, h)]);
    }
  return out;
}

}  // namespace

Answer scan(const Problem& p) {
  const std::int64_t K = p.key_dim, V = p.value_dim;
  const Vector phi_q = features(p, p.q), phi_k = features(p, p.k);
  const Mass mass = scan_mass(p, phi_k);
  std::vector<Vector> M = {p.M};
  for (std::int64_t s = 0; s < p.closed(); ++s) {
    Vector next(p.M.size());
    for (std::int64_t g = 0; g < p.kv_heads; ++g) {
      Vector keep(static_cast<std::size_t>(K * K)), add(static_cast<std::size_t>(K * V));
      for (std::int64_t i = 0; i < K; ++i) keep[i * K + i] = 1;
      for (std::int64_t row = rows_of(p, s).begin; row < rows_of(p, s).end; ++row) {
        const double *phi = &phi_k[at_k(p, row, g)], *z = &mass.before[s][g * K];
        const double w = p.weight[row];
        if (w == 0) continue;
        const bool subtracts = p.options.update == Update::kDelta && !is_empty(z, K);
        for (std::int64_t i = 0; i < K; ++i) {
          add_scaled(w * phi[i], &p.v[at_v(p, row, g)], &add[i * V], V);
          if (subtracts) add_scaled(-w * phi[i] / dot(phi, z, K), phi, &keep[i * K], K);
        }
      }
      for (std::int64_t i = 0; i < K; ++i) {
        double* to = &next[(g * K + i) * V];
        add_scaled(1, &add[i * V], to, V);
        for (std::int64_t j = 0; j < K; ++j)
          add_scaled(keep[i * K + j], &M.back()[(g * K + j) * V], to, V);
      }
    }
    M.push_back(next);
  }
  const auto read = [&](std::int64_t t, std::int64_t h, std::int64_t g, std::int64_t s) {
    return retrieve(&phi_q[at_q(p, t, h)], &M[s][g * K * V], &mass.before[s][g * K], K, V);
  };
  return {read_all(p, mass, read), M.back(), mass.before.back()};
}

Answer slots(const Problem& p) {
  const std::int64_t K = p.key_dim, V = p.value_dim;
  const Vector phi_q = features(p, p.q), phi_k = features(p, p.k);
  const Mass mass = scan_mass(p, phi_k);
  // p_i over the slots, by logarithms; a slot without mass has none.
  const auto slot_weights = [&](const double* phi, const double* z) {
    Vector w(static_cast<std::size_t>(K));
    for (std::int64_t i = 0; i < K; ++i)
      w[i] = z[i] > 0 ? std::log(phi[i]) + std::log(z[i]) : -kInfinity;
    const double top = *std::ranges::max_element(w);
    double sum = 0;
    for (double& x : w) sum += x = std::exp(x - top);
    for (double& x : w) x /= sum;
    return w;
  };
  const auto read_slots = [&](const double* phi, const double* z, const double* means) {
    const Vector w = slot_weights(phi, z);
    Vector out(static_cast<std::size_t>(V));
    for (std::int64_t i = 0; i < K; ++i) add_scaled(w[i], means + i * V, out.data(), V);
    return out;
  };
  std::vector<Vector> means = {p.M};
  for (std::int64_t i = 0; i < p.kv_heads * K; ++i)
    for (std::int64_t c = 0; c < V; ++c)
      means[0][i * V + c] = p.z[i] > 0 ? p.M[i * V + c] / p.z[i] : 0;
  for (std::int64_t s = 0; s < p.closed(); ++s) {
    Vector written(p.M.size());
    for (std::int64_t row = rows_of(p, s).begin; row < rows_of(p, s).end; ++row)
      for (std::int64_t g = 0; g < p.kv_heads && p.weight[row] != 0; ++g) {
        const double *phi = &phi_k[at_k(p, row, g)], *z = &mass.before[s][g * K];
        Vector e(&p.v[at_v(p, row, g)], &p.v[at_v(p, row, g)] + V);
        if (p.options.update == Update::kDelta && !is_empty(z, K))
          add_scaled(-1, read_slots(phi, z, &means.back()[g * K * V]).data(), e.data(), V);
        for (std::int64_t i = 0; i < K; ++i)
          add_scaled(p.weight[row] * phi[i], e.data(), &written[(g * K + i) * V], V);
      }
    Vector next = means.back();
    const Vector &z = mass.before[s], &after = mass.before[s + 1];
    for (std::int64_t i = 0; i < p.kv_heads * K; ++i)
      for (std::int64_t c = 0; c < V; ++c)
        if (after[i] > 0)
          next[i * V + c] += (written[i * V + c] - (after[i] - z[i]) * next[i * V + c]) / after[i];
    means.push_back(next);
  }
  const auto read = [&](std::int64_t t, std::int64_t h, std::int64_t g, std::int64_t s) {
    return read_slots(&phi_q[at_q(p, t, h)], &mass.before[s][g * K], &means[s][g * K * V]);
  };
  Answer a{read_all(p, mass, read), means.back(), mass.before.back()};
  for (std::int64_t i = 0; i < p.kv_heads * K; ++i)
    for (std::int64_t c = 0; c < V; ++c) a.M[i * V + c] *= a.z[i];
  return a;
}

Answer explicit_pairs(const Problem& p) {
  const std::int64_t K = p.key_dim, V = p.value_dim;
  const Vector phi_q = features(p, p.q), phi_k = features(p, p.k);
  const Mass mass = scan_mass(p, phi_k);
  Vector e = p.v;  // what each token writes
  // Sums over the initial memory and the rows before `end` of weight times kernel.
  const auto answer = [&](const double* phi, std::int64_t g, std::int64_t end) {
    Vector sum(static_cast<std::size_t>(V));
    double total = dot(phi, &p.z[g * K], K);
    for (std::int64_t i = 0; i < K; ++i) add_scaled(phi[i], &p.M[(g * K + i) * V], sum.data(), V);
    for (std::int64_t j = 0; j < end; ++j) {
      if (p.weight[j] == 0) continue;
      const double kernel = p.weight[j] * dot(phi, &phi_k[at_k(p, j, g)], K);
      add_scaled(kernel, &e[at_v(p, j, g)], sum.data(), V);
      total += kernel * mass.share[j * p.kv_heads + g];
    }
    for (double& x : sum) x /= total;
    return sum;
  };
  if (p.options.update == Update::kDelta)
    for (std::int64_t row = 0; row < p.rows(); ++row)
      for (std::int64_t g = 0; g < p.kv_heads; ++g) {
        const std::int64_t s = segment_of(p, row);
        if (s >= p.closed() || is_empty(&mass.before[s][g * K], K)) continue;
        const Vector known = answer(&phi_k[at_k(p, row, g)], g, segment_begin(p, row));
        add_scaled(-1, known.data(), &e[at_v(p, row, g)], V);
      }
  const auto read = [&](std::int64_t t, std::int64_t h, std::int64_t g, std::int64_t s) {
    return answer(&phi_q[at_q(p, t, h)], g, s * p.options.segment);
  };
  Answer a{read_all(p, mass, read), p.M, mass.before.back()};
  const std::int64_t end = std::min(p.closed() * p.options.segment, p.rows());
  for (std::int64_t row = 0; row < end; ++row)
    for (std::int64_t g = 0; g < p.kv_heads && p.weight[row] != 0; ++g)
      for (std::int64_t i = 0; i < K; ++i)
        add_scaled(p.weight[row] * phi_k[at_k(p, row, g) + i], &e[at_v(p, row, g)],
                   &a.M[(g * K + i) * V], V);
  return a;
}

}  // namespace everlong::infini::reference
