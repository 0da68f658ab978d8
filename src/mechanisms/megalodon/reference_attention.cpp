#include <algorithm>
#include <cmath>

#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon::reference {
namespace {

// Turns the pairs of one head's vector by the angles of a position; sign -1 turns back.
void turn(double* x, std::int64_t dim, std::int64_t position, double base, double sign) {
  for (std::int64_t i = 0; i < dim / 2; ++i) {
    const double angle = sign * static_cast<double>(position) *
                         std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(dim));
    const double a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * std::cos(angle) - b * std::sin(angle);
    x[2 * i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

std::int64_t position_of(const Attention& p, std::int64_t t) { return (p.past + t) % p.chunk; }

struct Rows {
  Doubles zn, scale;  // the normalised z [T, H, K], 1 / root mean square [T, H]
  Doubles q;          // [T, H, K]
  Doubles k, v;       // [past + T, H, K | V]
};

Rows prepare(const Attention& p) {
  const std::int64_t K = p.key_dim, HK = p.heads * K;
  const double root = std::sqrt(static_cast<double>(K));
  Rows rows;
  rows.zn.assign(p.z.begin(), p.z.end());
  for (std::int64_t r = 0; r < p.tokens * p.heads; ++r) {
    double square = 0;
    for (std::int64_t i = 0; i < K; ++i) square += rows.zn[r * K + i] * rows.zn[r * K + i];
    rows.scale.push_back(1 / std::sqrt(square / static_cast<double>(K) + p.eps));
    for (std::int64_t i = 0; i < K; ++i) rows.zn[r * K + i] *= rows.scale.back();
  }
  const auto project = [&](std::int64_t which) {
    Doubles out(rows.zn.size());
    for (std::int64_t t = 0; t < p.tokens; ++t)
      for (std::int64_t i = 0; i < HK; ++i)
        out[t * HK + i] =
            rows.zn[t * HK + i] * (1 + p.gamma[which * HK + i]) / root + p.beta[which * HK + i];
    for (std::int64_t r = 0; r < p.tokens * p.heads; ++r)
      turn(out.data() + r * K, K, position_of(p, r / p.heads), p.rope_base, 1);
    return out;
  };
  rows.q = project(0);
  rows.k.assign(p.cache_k.begin(), p.cache_k.end());
  rows.v.assign(p.cache_v.begin(), p.cache_v.end());
  const Doubles fresh = project(1);
  rows.k.insert(rows.k.end(), fresh.begin(), fresh.end());
  rows.v.insert(rows.v.end(), p.v.begin(), p.v.end());
  return rows;
}

// The row of the first key in token t's chunk; its last one is p.past + t.
std::int64_t first_key(const Attention& p, std::int64_t t) {
  return p.past + t - position_of(p, t);
}

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// softmax of q_t . k over the keys of token t's chunk up to itself.
Doubles weights(const Attention& p, const Rows& rows, std::int64_t t, std::int64_t h) {
  Doubles w;
  const double* q = rows.q.data() + (t * p.heads + h) * p.key_dim;
  for (std::int64_t s = first_key(p, t); s <= p.past + t; ++s)
    w.push_back(dot(q, rows.k.data() + (s * p.heads + h) * p.key_dim, p.key_dim));
  const double largest = *std::max_element(w.begin(), w.end());
  double sum = 0;
  for (double& x : w) sum += x = std::exp(x - largest);
  for (double& x : w) x /= sum;
  return w;
}

Doubles mix(const Attention& p, const Rows& rows) {
  Doubles o(p.v.size());
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const Doubles w = weights(p, rows, t, h);
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::int64_t s = first_key(p, t) + static_cast<std::int64_t>(i);
        for (std::int64_t j = 0; j < p.value_dim; ++j)
          o[(t * p.heads + h) * p.value_dim + j] +=
              w[i] * rows.v[(s * p.heads + h) * p.value_dim + j];
      }
    }
  return o;
}

}  // namespace

AttentionResult chunk_attention(const Attention& p) {
  const Rows rows = prepare(p);
  AttentionResult out;
  out.o = mix(p, rows);
  out.count = (p.past + p.tokens) % p.chunk;
  const auto last = [&](const Doubles& all, std::int64_t dim) {
    return Doubles(all.end() - out.count * p.heads * dim, all.end());
  };
  out.cache_k = last(rows.k, p.key_dim);
  out.cache_v = last(rows.v, p.value_dim);
  return out;
}

AttentionResult chunk_attention_recurrent(const Attention& p) {
  AttentionResult out;
  out.cache_k.assign(p.cache_k.begin(), p.cache_k.end());
  out.cache_v.assign(p.cache_v.begin(), p.cache_v.end());
  out.count = p.past;
  const std::int64_t HK = p.heads * p.key_dim, HV = p.heads * p.value_dim;
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    Attention one = p;
    one.tokens = 1;
    one.past = 0;
    one.z = p.z.subspan(static_cast<std::size_t>(t * HK), static_cast<std::size_t>(HK));
    one.v = p.v.subspan(static_cast<std::size_t>(t * HV), static_cast<std::size_t>(HV));
    one.past = out.count;
    one.cache_k = out.cache_k;
    one.cache_v = out.cache_v;
    const Rows rows = prepare(one);
    const Doubles o = mix(one, rows);
    out.o.insert(out.o.end(), o.begin(), o.end());
    out.cache_k = rows.k;
    out.cache_v = rows.v;
    if (++out.count < p.chunk) continue;
    out.cache_k.clear();
    out.cache_v.clear();
    out.count = 0;
  }
  return out;
}

AttentionGradients chunk_attention_gradients(const Attention& p, Values grad_o, Values grad_k,
                                             Values grad_v) {
  const Rows rows = prepare(p);
  const std::int64_t K = p.key_dim, V = p.value_dim, HK = p.heads * K;
  Doubles dq(rows.q.size()), dk(rows.k.size()), dv(rows.v.size());
  for (std::int64_t t = 0; t < p.tokens && !grad_o.empty(); ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const Doubles w = weights(p, rows, t, h);
      const double* go = grad_o.data() + (t * p.heads + h) * V;
      Doubles dw(w.size());
      double delta = 0;
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::int64_t row = (first_key(p, t) + static_cast<std::int64_t>(i)) * p.heads + h;
        dw[i] = dot(go, rows.v.data() + row * V, V);
        delta += w[i] * dw[i];
        for (std::int64_t j = 0; j < V; ++j) dv[row * V + j] += w[i] * go[j];
      }
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::int64_t row = (first_key(p, t) + static_cast<std::int64_t>(i)) * p.heads + h;
        const double ds = w[i] * (dw[i] - delta);
        for (std::int64_t j = 0; j < K; ++j) {
          dq[(t * p.heads + h) * K + j] += ds * rows.k[row * K + j];
          dk[row * K + j] += ds * rows.q[(t * p.heads + h) * K + j];
        }
      }
    }
  // The final caches are the last rows of k and v.
  const auto add_last = [](Doubles& all, Values last) {
    for (std::size_t i = 0; i < last.size(); ++i) all[all.size() - last.size() + i] += last[i];
  };
  add_last(dk, grad_k);
  add_last(dv, grad_v);

  AttentionGradients d;
  const std::int64_t past_k = p.past * HK, past_v = p.past * p.heads * V;
  d.cache_k.assign(dk.begin(), dk.begin() + past_k);
  d.cache_v.assign(dv.begin(), dv.begin() + past_v);
  d.v.assign(dv.begin() + past_v, dv.end());
  d.z.resize(p.z.size());
  d.gamma.resize(p.gamma.size());
  d.beta.resize(p.beta.size());
  const double root = std::sqrt(static_cast<double>(K));
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t at = (t * p.heads + h) * K;
      double* const both[] = {dq.data() + at, dk.data() + past_k + at};
      for (double* grad : both) turn(grad, K, position_of(p, t), p.rope_base, -1);
      Doubles dzn(static_cast<std::size_t>(K));
      for (std::int64_t which = 0; which < 2; ++which)
        for (std::int64_t i = 0; i < K; ++i) {
          const std::int64_t c = which * HK + h * K + i;
          d.gamma[c] += both[which][i] * rows.zn[at + i] / root;
          d.beta[c] += both[which][i];
          dzn[i] += both[which][i] * (1 + p.gamma[c]) / root;
        }
      const double along = dot(dzn.data(), rows.zn.data() + at, K) / static_cast<double>(K);
      for (std::int64_t i = 0; i < K; ++i)
        d.z[at + i] = rows.scale[t * p.heads + h] * (dzn[i] - rows.zn[at + i] * along);
    }
  return d;
}

}  // namespace everlong::megalodon::reference
