#include <cmath>

#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon::reference {
namespace {

struct Moments {
  double mean, var;
};

Moments moments(const double* x, std::int64_t count) {
  Moments m{0, 0};
  for (std::int64_t i = 0; i < count; ++i) m.mean += x[i];
  m.mean /= static_cast<double>(count);
  for (std::int64_t i = 0; i < count; ++i) m.var += (x[i] - m.mean) * (x[i] - m.mean);
  m.var /= static_cast<double>(count);
  return m;
}

Doubles or_zeros(Values values, std::int64_t size) {
  Doubles out(values.begin(), values.end());
  out.resize(static_cast<std::size_t>(size));
  return out;
}

// The statistics after every token, [T + 1, G]; row 0 is what came in.
struct History {
  Doubles mean, var;
};

History recur(const Norm& p) {
  const std::int64_t G = p.groups, d = p.width / G;
  History all{or_zeros(p.mean, (p.tokens + 1) * G), or_zeros(p.var, (p.tokens + 1) * G)};
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    const auto n = static_cast<double>(p.count + t + 1);
    for (std::int64_t g = 0; g < G; ++g) {
      const Moments token = moments(p.x.data() + t * p.width + g * d, d);
      const double mean = all.mean[t * G + g], var = all.var[t * G + g];
      const double step = token.mean - mean;
      all.mean[(t + 1) * G + g] = mean + step / n;
      all.var[(t + 1) * G + g] = var + (token.var + (1 - 1 / n) * step * step - var) / n;
    }
  }
  return all;
}

// With a shift near the data: the pooled second moment cancels otherwise.
History pool(const Norm& p) {
  const std::int64_t G = p.groups, d = p.width / G;
  const auto before = static_cast<double>(p.count);
  History all{or_zeros(p.mean, (p.tokens + 1) * G), or_zeros(p.var, (p.tokens + 1) * G)};
  for (std::int64_t g = 0; g < G; ++g) {
    if (p.tokens == 0) break;
    const double shift = p.count > 0 ? all.mean[g] : p.x[g * d];
    double first = before * (all.mean[g] - shift);
    double second = before * (all.var[g] + (all.mean[g] - shift) * (all.mean[g] - shift));
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      for (std::int64_t i = 0; i < d; ++i) {
        const double x = p.x[t * p.width + g * d + i] - shift;
        first += x / static_cast<double>(d);
        second += x * x / static_cast<double>(d);
      }
      const double n = before + static_cast<double>(t + 1);
      all.mean[(t + 1) * G + g] = shift + first / n;
      all.var[(t + 1) * G + g] = second / n - (first / n) * (first / n);
    }
  }
  return all;
}

NormResult normalise(const Norm& p, const History& all) {
  const std::int64_t G = p.groups, d = p.width / G;
  NormResult result;
  result.y.resize(p.x.size());
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t c = 0; c < p.width; ++c) {
      const std::int64_t at = (t + 1) * G + c / d;
      result.y[t * p.width + c] = (p.x[t * p.width + c] - all.mean[at]) /
                                      std::sqrt(all.var[at] + p.eps) * (1 + p.weight[c]) +
                                  p.bias[c];
    }
  result.mean.assign(all.mean.end() - G, all.mean.end());
  result.var.assign(all.var.end() - G, all.var.end());
  result.count = p.count + p.tokens;
  return result;
}

}  // namespace

NormResult timestep_norm(const Norm& p) { return normalise(p, recur(p)); }
NormResult timestep_norm_pooled(const Norm& p) { return normalise(p, pool(p)); }

// (u, w) is the gradient of (mu_t, var_t) while t falls.
NormGradients timestep_norm_gradients(const Norm& p, Values grad_y, Values grad_mean,
                                      Values grad_var) {
  const std::int64_t G = p.groups, d = p.width / G;
  const History all = recur(p);
  NormGradients out;
  out.x.resize(p.x.size());
  out.weight.resize(static_cast<std::size_t>(p.width));
  out.bias.resize(static_cast<std::size_t>(p.width));
  out.mean = or_zeros(grad_mean, G);
  out.var = or_zeros(grad_var, G);
  for (std::int64_t t = p.tokens; t-- > 0;) {
    const auto n = static_cast<double>(p.count + t + 1);
    const double kept = (n - 1) / n, added = 1 / n;
    for (std::int64_t g = 0; g < G; ++g) {
      double &u = out.mean[g], &w = out.var[g];
      const std::int64_t at = t * p.width + g * d;
      const double mean = all.mean[(t + 1) * G + g], before = all.mean[t * G + g];
      const double r = 1 / std::sqrt(all.var[(t + 1) * G + g] + p.eps);
      const double step = moments(p.x.data() + at, d).mean - before;
      for (std::int64_t i = 0; i < d; ++i) {
        const double dy = grad_y.empty() ? 0 : grad_y[at + i], x = p.x[at + i];
        const double scaled = dy * (1 + p.weight[g * d + i]);
        u -= r * scaled;
        w -= r * r * r * scaled * (x - mean) / 2;
        out.weight[g * d + i] += dy * (x - mean) * r;
        out.bias[g * d + i] += dy;
      }
      for (std::int64_t i = 0; i < d; ++i) {
        const double dy = grad_y.empty() ? 0 : grad_y[at + i];
        const double token_mean = before + step;
        out.x[at + i] =
            dy * (1 + p.weight[g * d + i]) * r +
            (added * u + 2 * kept * added * w * step + 2 * added * w * (p.x[at + i] - token_mean)) /
                static_cast<double>(d);
      }
      u = kept * u - 2 * kept * added * w * step;
      w = kept * w;
    }
  }
  return out;
}

}  // namespace everlong::megalodon::reference
