#include "mechanisms/longnet/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace everlong::longnet::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double factor, const double* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

std::int64_t kv_head(const Problem& p, std::int64_t head) { return head / (p.heads / p.kv_heads); }

bool on_lattice(const Problem& p, std::size_t i, std::int64_t position, std::int64_t g) {
  const auto [w, r] = p.geometry.patterns[i];
  return position % w % r == offset_of(p.geometry.offset_rule, g, p.kv_heads, r);
}

bool covers(const Problem& p, std::size_t i, std::int64_t position, std::int64_t g) {
  return position >= p.geometry.active_from(i) && on_lattice(p, i, position, g);
}

// A key of pattern i: a token of the call, or (token < 0) a row of the pattern's buffer.
struct Key {
  std::int64_t token, row;
};

std::int64_t key_at(const Problem& p, const Key& key, std::int64_t g) {
  return key.token * p.kv_heads + g;
}
std::int64_t row_at(const Problem& p, std::size_t i, const Key& key, std::int64_t g) {
  return g * p.geometry.patterns[i].rows() + key.row;
}
const double* key_of(const Problem& p, std::size_t i, const Key& key, std::int64_t g) {
  return key.token >= 0 ? p.k.data() + key_at(p, key, g) * p.key_dim
                        : p.past.k[i].data() + row_at(p, i, key, g) * p.key_dim;
}
const double* value_of(const Problem& p, std::size_t i, const Key& key, std::int64_t g) {
  return key.token >= 0 ? p.v.data() + key_at(p, key, g) * p.value_dim
                        : p.past.v[i].data() + row_at(p, i, key, g) * p.value_dim;
}

// What a query at `position` on the lattice of pattern i sees through it.
std::vector<Key> seen(const Problem& p, std::size_t i, std::int64_t position, std::int64_t g) {
  const auto [w, r] = p.geometry.patterns[i];
  const std::int64_t start = position / w * w;
  const std::int64_t end =
      p.geometry.causal ? position + 1 : std::min(start + w, p.position + p.tokens);
  std::vector<Key> keys;
  for (std::int64_t j = start; j < end; ++j)
    if (on_lattice(p, i, j, g))
      keys.push_back({j < p.position ? -1 : j - p.position, (j - start) / r});
  return keys;
}

// Zero keys beside them.
std::int64_t phantoms(const Problem& p, std::size_t i, std::int64_t real) {
  if (!p.geometry.phantom) return 0;
  const auto [w, r] = p.geometry.patterns[i];
  return (std::min(w, p.tokens) + r - 1) / r - real;
}

// One pattern alone for one query: softmax weights of its keys (zero keys hold the rest).
struct Alone {
  bool covered = false;
  std::vector<Key> keys;
  std::vector<double> scores, out;
  double lse = -kInfinity;
};

Alone alone(const Problem& p, std::size_t i, std::int64_t t, std::int64_t h) {
  Alone a;
  const std::int64_t g = kv_head(p, h), position = p.position + t;
  a.out.assign(static_cast<std::size_t>(p.value_dim), 0.0);
  if (!covers(p, i, position, g)) return a;
  a.covered = true;
  a.keys = seen(p, i, position, g);
  const auto zeros = static_cast<double>(phantoms(p, i, static_cast<std::int64_t>(a.keys.size())));
  const double* q = p.q.data() + (t * p.heads + h) * p.key_dim;
  double top = zeros > 0 ? 0.0 : -kInfinity;
  for (const Key& key : a.keys) {
    a.scores.push_back(p.scale * dot(q, key_of(p, i, key, g), p.key_dim));
    top = std::max(top, a.scores.back());
  }
  double sum = zeros > 0 ? zeros * std::exp(-top) : 0.0;
  for (const double s : a.scores) sum += std::exp(s - top);
  a.lse = top + std::log(sum);
  for (std::size_t n = 0; n < a.keys.size(); ++n)
    add_scaled(std::exp(a.scores[n] - a.lse), value_of(p, i, a.keys[n], g), a.out.data(),
               p.value_dim);
  return a;
}

std::vector<double> new_output(const Problem& p) {
  return std::vector<double>(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim));
}

double log_sum(const std::vector<Alone>& parts) {
  double top = -kInfinity, sum = 0;
  for (const Alone& a : parts)
    if (a.covered) top = std::max(top, a.lse);
  if (top == -kInfinity) return top;
  for (const Alone& a : parts)
    if (a.covered) sum += std::exp(a.lse - top);
  return top + std::log(sum);
}

std::vector<Alone> all_alone(const Problem& p, std::int64_t t, std::int64_t h) {
  std::vector<Alone> parts;
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) parts.push_back(alone(p, i, t, h));
  return parts;
}

Buffers empty_buffers(const Problem& p) {
  Buffers b;
  for (const Pattern& pattern : p.geometry.patterns) {
    const std::int64_t rows = p.kv_heads * pattern.rows();
    b.k.emplace_back(static_cast<std::size_t>(rows * p.key_dim));
    b.v.emplace_back(static_cast<std::size_t>(rows * p.value_dim));
  }
  return b;
}

// Token t of the call enters the buffers of every lattice that it lies on; the first token of a
// segment clears it.
void push(const Problem& p, std::int64_t t, Buffers& b) {
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
    const auto [w, r] = p.geometry.patterns[i];
    const std::int64_t local = (p.position + t) % w;
    if (local == 0) {
      std::ranges::fill(b.k[i], 0.0);
      std::ranges::fill(b.v[i], 0.0);
    }
    for (std::int64_t g = 0; g < p.kv_heads; ++g) {
      if (!on_lattice(p, i, p.position + t, g)) continue;
      const std::int64_t row = row_at(p, i, {-1, local / r}, g), at = t * p.kv_heads + g;
      std::copy_n(p.k.data() + at * p.key_dim, p.key_dim, b.k[i].data() + row * p.key_dim);
      std::copy_n(p.v.data() + at * p.value_dim, p.value_dim, b.v[i].data() + row * p.value_dim);
    }
  }
}

}  // namespace

std::vector<double> closed_form(const Problem& p) {
  std::vector<double> out = new_output(p);
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t g = kv_head(p, h), position = p.position + t;
      struct Seen {
        const double* value;
        double score;
      };
      std::vector<Seen> all;
      std::vector<std::int64_t> times(static_cast<std::size_t>(p.tokens), 0);
      const double* q = p.q.data() + (t * p.heads + h) * p.key_dim;
      std::int64_t zeros = 0;
      for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
        if (!covers(p, i, position, g)) continue;
        const auto keys = seen(p, i, position, g);
        zeros += phantoms(p, i, static_cast<std::int64_t>(keys.size()));
        for (const Key& key : keys) {
          // A key of the past is known through the buffer of its pattern alone.
          if (key.token >= 0)
            ++times[static_cast<std::size_t>(key.token)];
          else
            all.push_back(
                {value_of(p, i, key, g), p.scale * dot(q, key_of(p, i, key, g), p.key_dim)});
        }
      }
      for (std::int64_t j = 0; j < p.tokens; ++j) {
        const std::int64_t c = times[static_cast<std::size_t>(j)], at = j * p.kv_heads + g;
        if (c > 0)
          all.push_back({p.v.data() + at * p.value_dim,
                         p.scale * dot(q, p.k.data() + at * p.key_dim, p.key_dim) +
                             std::log(static_cast<double>(c))});
      }
      if (all.empty()) continue;
      double top = zeros > 0 ? std::log(static_cast<double>(zeros)) : -kInfinity;
      for (const Seen& s : all) top = std::max(top, s.score);
      double sum = zeros > 0 ? static_cast<double>(zeros) * std::exp(-top) : 0.0;
      for (const Seen& s : all) sum += std::exp(s.score - top);
      double* o = out.data() + (t * p.heads + h) * p.value_dim;
      for (const Seen& s : all) add_scaled(std::exp(s.score - top) / sum, s.value, o, p.value_dim);
    }
  return out;
}

Merged merged(const Problem& p) {
  Merged m{new_output(p), {}, {}};
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const auto parts = all_alone(p, t, h);
      m.lse.push_back(log_sum(parts));
      double* o = m.out.data() + (t * p.heads + h) * p.value_dim;
      for (const Alone& a : parts) {
        m.mix.push_back(a.covered ? std::exp(a.lse - m.lse.back()) : 0.0);
        if (a.covered) add_scaled(m.mix.back(), a.out.data(), o, p.value_dim);
      }
    }
  return m;
}

std::vector<double> mixed_by(const Problem& p, std::span<const double> mix) {
  std::vector<double> out = new_output(p);
  std::size_t at = 0;
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h)
      for (const Alone& a : all_alone(p, t, h))
        add_scaled(mix[at++], a.out.data(), out.data() + (t * p.heads + h) * p.value_dim,
                   p.value_dim);
  return out;
}

std::vector<double> recurrent(const Problem& p) {
  std::vector<double> out = new_output(p);
  Buffers b = p.past.k.empty() ? empty_buffers(p) : p.past;
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    push(p, t, b);
    const std::int64_t position = p.position + t;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t g = kv_head(p, h);
      const double* q = p.q.data() + (t * p.heads + h) * p.key_dim;
      double* o = out.data() + (t * p.heads + h) * p.value_dim;
      double top = -kInfinity, sum = 0;
      for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
        const auto [w, r] = p.geometry.patterns[i];
        if (!covers(p, i, position, g)) continue;
        const std::int64_t held =
            rows_held(p.geometry.patterns[i], offset_of(p.geometry.offset_rule, g, p.kv_heads, r),
                      position + 1);
        for (std::int64_t l = 0; l < held; ++l) {
          const std::int64_t row = row_at(p, i, {-1, l}, g);
          const double s = p.scale * dot(q, b.k[i].data() + row * p.key_dim, p.key_dim);
          const double higher = std::max(top, s), fade = std::exp(top - higher),
                       e = std::exp(s - higher);
          for (std::int64_t d = 0; d < p.value_dim; ++d)
            o[d] = o[d] * fade + e * b.v[i][static_cast<std::size_t>(row * p.value_dim + d)];
          sum = sum * fade + e;
          top = higher;
        }
      }
      for (std::int64_t d = 0; d < p.value_dim && sum > 0; ++d) o[d] /= sum;
    }
  }
  return out;
}

Buffers final_buffers(const Problem& p) {
  Buffers b = p.past.k.empty() ? empty_buffers(p) : p.past;
  for (std::int64_t t = 0; t < p.tokens; ++t) push(p, t, b);
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i)
    for (std::int64_t g = 0; g < p.kv_heads; ++g) {
      const Pattern& pattern = p.geometry.patterns[i];
      const std::int64_t offset = offset_of(p.geometry.offset_rule, g, p.kv_heads, pattern.ratio);
      const std::int64_t held = rows_held(pattern, offset, p.position + p.tokens);
      const std::int64_t row = row_at(p, i, {-1, held}, g), rest = pattern.rows() - held;
      std::fill_n(b.k[i].begin() + row * p.key_dim, rest * p.key_dim, 0.0);
      std::fill_n(b.v[i].begin() + row * p.value_dim, rest * p.value_dim, 0.0);
    }
  return b;
}

Gradients gradients(const Problem& p, std::span<const double> grad_out) {
  Gradients d{std::vector<double>(p.q.size()), std::vector<double>(p.k.size()),
              std::vector<double>(p.v.size()), empty_buffers(p)};
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t g = kv_head(p, h), row = t * p.heads + h;
      const double* go = grad_out.data() + row * p.value_dim;
      const double* q = p.q.data() + row * p.key_dim;
      const auto parts = all_alone(p, t, h);
      const double lse = log_sum(parts);
      double joint_delta = 0;  // <dO, O> of the whole row
      for (const Alone& a : parts)
        if (a.covered) joint_delta += std::exp(a.lse - lse) * dot(go, a.out.data(), p.value_dim);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const Alone& a = parts[i];
        const double delta = p.geometry.detached ? dot(go, a.out.data(), p.value_dim) : joint_delta;
        for (std::size_t n = 0; n < a.keys.size(); ++n) {
          const Key& key = a.keys[n];
          const double weight = std::exp(a.scores[n] - lse);
          const double slope =
              p.scale * weight * (dot(go, value_of(p, i, key, g), p.value_dim) - delta);
          double* dk = key.token >= 0 ? d.k.data() + key_at(p, key, g) * p.key_dim
                                      : d.past.k[i].data() + row_at(p, i, key, g) * p.key_dim;
          double* dv = key.token >= 0 ? d.v.data() + key_at(p, key, g) * p.value_dim
                                      : d.past.v[i].data() + row_at(p, i, key, g) * p.value_dim;
          add_scaled(weight, go, dv, p.value_dim);
          add_scaled(slope, q, dk, p.key_dim);
          add_scaled(slope, key_of(p, i, key, g), d.q.data() + row * p.key_dim, p.key_dim);
        }
      }
    }
  return d;
}

}  // namespace everlong::longnet::reference
