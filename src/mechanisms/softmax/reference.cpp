#include "mechanisms/softmax/reference.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

namespace everlong::softmax::reference {
namespace {

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double factor, const double* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

const double* query(const Problem& p, std::int64_t t, std::int64_t h) {
  return p.q.data() + (t * p.heads + h) * p.key_dim;
}
const double* key(const Problem& p, std::int64_t s, std::int64_t h) {
  return p.k.data() + (s * p.kv_heads + h / (p.heads / p.kv_heads)) * p.key_dim;
}
const double* value(const Problem& p, std::int64_t s, std::int64_t h) {
  return p.v.data() + (s * p.kv_heads + h / (p.heads / p.kv_heads)) * p.value_dim;
}

std::int64_t first_seen(const Problem& p, std::int64_t t) {
  return p.window > 0 ? std::max<std::int64_t>(p.past + t - p.window + 1, 0) : 0;
}

// p_ts for s in [first_seen(t), past + t].
std::vector<double> weights(const Problem& p, std::int64_t t, std::int64_t h) {
  std::vector<double> w;
  for (std::int64_t s = first_seen(p, t); s <= p.past + t; ++s)
    w.push_back(p.scale * dot(query(p, t, h), key(p, s, h), p.key_dim));
  const double largest = *std::max_element(w.begin(), w.end());
  double sum = 0;
  for (double& x : w) sum += x = std::exp(x - largest);
  for (double& x : w) x /= sum;
  return w;
}

std::vector<double> new_output(const Problem& p) {
  return std::vector<double>(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim));
}

}  // namespace

std::vector<double> parallel(const Problem& p) {
  std::vector<double> out = new_output(p);
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const auto w = weights(p, t, h);
      double* o = out.data() + (t * p.heads + h) * p.value_dim;
      for (std::size_t i = 0; i < w.size(); ++i)
        add_scaled(w[i], value(p, first_seen(p, t) + static_cast<std::int64_t>(i), h), o,
                   p.value_dim);
    }
  return out;
}

std::vector<double> recurrent(const Problem& p) {
  struct Row {
    std::vector<double> key, value;
  };
  const auto group = p.heads / p.kv_heads;
  std::vector<double> out = new_output(p);
  for (std::int64_t g = 0; g < p.kv_heads; ++g) {
    std::deque<Row> cache;
    const auto push = [&](std::int64_t s) {
      const double *k = key(p, s, g * group), *v = value(p, s, g * group);
      cache.push_back({{k, k + p.key_dim}, {v, v + p.value_dim}});
      if (p.window > 0 && static_cast<std::int64_t>(cache.size()) > p.window) cache.pop_front();
    };
    for (std::int64_t s = 0; s < p.past; ++s) push(s);
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      push(p.past + t);
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (const Row& row : cache)
          largest = std::max(largest, p.scale * dot(query(p, t, h), row.key.data(), p.key_dim));
        double* o = out.data() + (t * p.heads + h) * p.value_dim;
        for (const Row& row : cache) {
          const double e =
              std::exp(p.scale * dot(query(p, t, h), row.key.data(), p.key_dim) - largest);
          sum += e;
          add_scaled(e, row.value.data(), o, p.value_dim);
        }
        for (std::int64_t i = 0; i < p.value_dim; ++i) o[i] /= sum;
      }
    }
  }
  return out;
}

Partial merge(const Partial& a, const Partial& b) {
  if (std::isinf(a.lse) && a.lse < 0) return b;
  if (std::isinf(b.lse) && b.lse < 0) return a;
  const double largest = std::max(a.lse, b.lse);
  const double wa = std::exp(a.lse - largest), wb = std::exp(b.lse - largest);
  Partial both{std::vector<double>(a.out.size()), largest + std::log(wa + wb)};
  for (std::size_t i = 0; i < a.out.size(); ++i)
    both.out[i] = (wa * a.out[i] + wb * b.out[i]) / (wa + wb);
  return both;
}

std::vector<double> online(const Problem& p, std::int64_t block) {
  std::vector<double> out = new_output(p);
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const Partial nothing{std::vector<double>(static_cast<std::size_t>(p.value_dim)),
                            -std::numeric_limits<double>::infinity()};
      Partial all = nothing;
      // Blocks lie at fixed places of the text, so the first and the last are often seen in part.
      for (std::int64_t begin = 0; begin <= p.past + t; begin += block) {
        Partial some = nothing;
        for (std::int64_t s = begin; s < std::min(begin + block, p.past + t + 1); ++s) {
          if (s < first_seen(p, t)) continue;
          const double* v = value(p, s, h);
          some = merge(
              some, {{v, v + p.value_dim}, p.scale * dot(query(p, t, h), key(p, s, h), p.key_dim)});
        }
        all = merge(all, some);
      }
      std::copy(all.out.begin(), all.out.end(), out.begin() + (t * p.heads + h) * p.value_dim);
    }
  return out;
}

Gradients gradients(const Problem& p, std::span<const double> grad_out) {
  Gradients d{std::vector<double>(p.q.size()), std::vector<double>(p.k.size()),
              std::vector<double>(p.v.size())};
  const std::vector<double> out = parallel(p);
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t row = (t * p.heads + h) * p.value_dim;
      const double* go = grad_out.data() + row;
      const double along = dot(go, out.data() + row, p.value_dim);
      double* dq = d.q.data() + (t * p.heads + h) * p.key_dim;
      const auto w = weights(p, t, h);
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::int64_t s = first_seen(p, t) + static_cast<std::int64_t>(i);
        const double ds = p.scale * w[i] * (dot(go, value(p, s, h), p.value_dim) - along);
        add_scaled(ds, key(p, s, h), dq, p.key_dim);
        add_scaled(ds, query(p, t, h), d.k.data() + (key(p, s, h) - p.k.data()), p.key_dim);
        add_scaled(w[i], go, d.v.data() + (value(p, s, h) - p.v.data()), p.value_dim);
      }
    }
  return d;
}

}  // namespace everlong::softmax::reference
