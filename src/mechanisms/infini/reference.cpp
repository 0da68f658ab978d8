#include "mechanisms/infini/reference.h"

#include <algorithm>

#include "mechanisms/infini/reference_parts.h"

namespace everlong::infini::reference {

std::int64_t Problem::closed() const {
  const std::int64_t C = options.segment;
  return options.commit_last ? (rows() + C - 1) / C : rows() / C;
}

double sigma(double x) { return std::max(x, 0.0) + std::exp(std::min(x, 0.0)); }

Vector features(const Problem& p, const Vector& x) {
  Vector out(x.size());
  std::ranges::transform(x, out.begin(), p.feature != nullptr ? p.feature : sigma);
  return out;
}

Vector rotate(const Problem& p, const Vector& x, std::int64_t heads, std::int64_t from,
              double direction) {
  if (p.options.rope == Rope::kNone) return x;
  Vector out = x;
  const std::int64_t K = p.key_dim, rows = static_cast<std::int64_t>(x.size()) / (heads * K);
  const bool interleaved = p.options.rope == Rope::kInterleaved;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < K / 2; ++i) {
        const double angle =
            static_cast<double>((from + r) % p.options.segment) *
            std::pow(p.options.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(K));
        const double c = std::cos(angle), s = direction * std::sin(angle);
        const std::int64_t base = (r * heads + h) * K;
        const std::int64_t a = base + (interleaved ? 2 * i : i),
                           b = base + (interleaved ? 2 * i + 1 : i + K / 2);
        out[a] = c * x[a] - s * x[b];
        out[b] = s * x[a] + c * x[b];
      }
  return out;
}

Vector local_weights(const Problem& p, const Vector& q, const Vector& k, std::int64_t t,
                     std::int64_t h) {
  Vector w;
  const std::int64_t g = h / p.group(), row = p.open + t;
  for (std::int64_t j = segment_begin(p, row); j <= row; ++j)
    w.push_back(scale_of(p.options, p.key_dim) *
                dot(&q[at_q(p, t, h)], &k[at_k(p, j, g)], p.key_dim));
  const double top = *std::ranges::max_element(w);
  double sum = 0;
  for (double& x : w) sum += x = std::exp(x - top);
  for (double& x : w) x /= sum;
  return w;
}

Vector local_attention(const Problem& p) {
  const Vector q = rotate(p, p.q, p.heads, p.open), k = rotate(p, p.k, p.kv_heads, 0);
  Vector out(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim));
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const Vector w = local_weights(p, q, k, t, h);
      const std::int64_t begin = segment_begin(p, p.open + t);
      for (std::size_t j = 0; j < w.size(); ++j)
        add_scaled(w[j], &p.v[at_v(p, begin + static_cast<std::int64_t>(j), h / p.group())],
                   &out[at_o(p, t, h)], p.value_dim);
    }
  return out;
}

bool is_empty(const double* z, std::int64_t key_dim) {
  return std::all_of(z, z + key_dim, [](double x) { return x == 0; });
}

Vector retrieve(const double* feature, const double* M, const double* z, std::int64_t K,
                std::int64_t V, double* den) {
  Vector out(static_cast<std::size_t>(V));
  const double sum = dot(feature, z, K);
  if (den != nullptr) *den = sum;
  if (is_empty(z, K)) return out;
  for (std::int64_t i = 0; i < K; ++i) add_scaled(feature[i] / sum, M + i * V, out.data(), V);
  return out;
}

double share_of_z(const Problem& p, const double* feature, const double* z) {
  if (p.options.delta_z == DeltaZ::kPaper) return 1;
  return std::clamp(1 - dot(feature, z, p.key_dim) / dot(feature, feature, p.key_dim), 0.0, 1.0);
}

void mix(const Problem& p, std::int64_t h, bool empty, const double* mem, const double* dot_t,
         double* o) {
  for (std::int64_t c = 0; c < p.value_dim; ++c) {
    const double g = p.gate[h * p.value_dim + c];
    const bool bypass = empty && p.options.empty == Empty::kBypass;
    o[c] = bypass ? dot_t[c] : g * mem[c] + (1 - g) * dot_t[c];
  }
}

Answer stream(const Problem& p) {
  const std::int64_t K = p.key_dim, V = p.value_dim;
  const Vector dots = local_attention(p), phi_q = features(p, p.q), phi_k = features(p, p.k);
  Answer a{Vector(dots.size()), p.M, p.z};
  Vector M = p.M, z = p.z;  // with what the open segment adds at its end
  for (std::int64_t row = 0; row < p.rows(); ++row) {
    for (std::int64_t h = 0; h < p.heads && row >= p.open; ++h) {
      const std::int64_t g = h / p.group(), t = row - p.open;
      const Vector mem = retrieve(&phi_q[at_q(p, t, h)], &a.M[g * K * V], &a.z[g * K], K, V);
      mix(p, h, is_empty(&a.z[g * K], K), mem.data(), &dots[at_o(p, t, h)], &a.out[at_o(p, t, h)]);
    }
    for (std::int64_t g = 0; g < p.kv_heads && p.weight[row] != 0; ++g) {
      const double* phi = &phi_k[at_k(p, row, g)];
      Vector e(&p.v[at_v(p, row, g)], &p.v[at_v(p, row, g)] + V);
      if (p.options.update == Update::kDelta)
        add_scaled(-1, retrieve(phi, &a.M[g * K * V], &a.z[g * K], K, V).data(), e.data(), V);
      for (std::int64_t i = 0; i < K; ++i)
        add_scaled(p.weight[row] * phi[i], e.data(), &M[(g * K + i) * V], V);
      add_scaled(p.weight[row] * share_of_z(p, phi, &a.z[g * K]), phi, &z[g * K], K);
    }
    const bool last = row + 1 == p.rows();
    if ((row + 1) % p.options.segment == 0 || (last && p.options.commit_last)) {
      a.M = M;
      a.z = z;
    }
  }
  return a;
}

}  // namespace everlong::infini::reference
