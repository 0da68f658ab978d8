#include "mechanisms/landmark/reference.h"

#include <cmath>
#include <limits>

namespace everlong::landmark::reference {
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

const double* query(const Problem& p, std::int64_t t, std::int64_t h) {
  return p.q.data() + (t * p.heads + h) * p.key_dim;
}
std::int64_t kv_index(const Problem& p, std::int64_t s, std::int64_t h) {
  return s * p.kv_heads + h / (p.heads / p.kv_heads);
}
const double* key(const Problem& p, std::int64_t s, std::int64_t h) {
  return p.k.data() + kv_index(p, s, h) * p.key_dim;
}
const double* value(const Problem& p, std::int64_t s, std::int64_t h) {
  return p.v.data() + kv_index(p, s, h) * p.value_dim;
}

std::vector<double> scores_of(const Problem& p, std::int64_t t, std::int64_t h) {
  std::vector<double> s;
  for (std::int64_t j = 0; j < p.keys(); ++j)
    s.push_back(p.scale * dot(query(p, t, h), key(p, j, h), p.key_dim));
  return s;
}

// log sum exp of scores [begin, end).
double log_sum(std::span<const double> s, std::int64_t begin, std::int64_t end) {
  double largest = -kInfinity, sum = 0;
  for (std::int64_t j = begin; j < end; ++j) largest = std::max(largest, s[j]);
  if (largest == -kInfinity) return largest;
  for (std::int64_t j = begin; j < end; ++j) sum += std::exp(s[j] - largest);
  return largest + std::log(sum);
}

// How a row splits its attention: by sections, the last of them its own, cut behind itself.
struct Row {
  std::vector<Section> sections;
  std::vector<double> lambda;  // of the ordinary tokens of each
  std::vector<double> gate;    // weight of each section as a whole
  double total = -kInfinity;   // L
};

Row split(std::span<const double> s, std::span<const std::uint8_t> marks, std::int64_t own,
          bool drop_empty) {
  Row row;
  // A landmark's own section is the one that it closes, without itself.
  row.sections = sections_of(marks.first(static_cast<std::size_t>(own) + (marks[own] ? 0 : 1)));
  const bool has_own = !row.sections.empty() && !row.sections.back().closed;
  if (!has_own) row.sections.push_back({own, own, false});  // it sees nothing near itself
  std::vector<double> scores;                               // of the sections as virtual keys
  for (const Section& b : row.sections) {
    row.lambda.push_back(log_sum(s, b.begin, b.end));
    const bool dropped = drop_empty && b.content() == 0;
    scores.push_back(!b.closed ? row.lambda.back() : dropped ? -kInfinity : s[b.end]);
  }
  row.total = log_sum(scores, 0, static_cast<std::int64_t>(scores.size()));
  for (const double z : scores)
    row.gate.push_back(row.total == -kInfinity ? 0 : std::exp(z - row.total));
  return row;
}

// Weight inside a section: e^(s - lambda).
double inner(const Row& row, std::size_t b, double score) {
  return std::exp(score - row.lambda[b]);
}

}  // namespace

std::vector<double> grouped_softmax(std::span<const double> s,
                                    std::span<const std::uint8_t> is_landmark, std::int64_t own,
                                    bool drop_empty) {
  const Row row = split(s, is_landmark, own, drop_empty);
  std::vector<double> w(s.size());
  for (std::size_t b = 0; b < row.sections.size(); ++b)
    for (std::int64_t j = row.sections[b].begin; j < row.sections[b].end; ++j)
      w[static_cast<std::size_t>(j)] = row.gate[b] * inner(row, b, s[j]);
  return w;
}

std::vector<double> grouped_softmax_gradient(std::span<const double> s,
                                             std::span<const std::uint8_t> is_landmark,
                                             std::int64_t own, bool drop_empty,
                                             std::span<const double> grad) {
  const Row row = split(s, is_landmark, own, drop_empty);
  std::vector<double> ds(s.size()), inside(row.sections.size());
  double along = 0;  // D
  for (std::size_t b = 0; b < row.sections.size(); ++b) {
    for (std::int64_t j = row.sections[b].begin; j < row.sections[b].end; ++j)
      inside[b] += inner(row, b, s[j]) * grad[j];  // D_b
    along += row.gate[b] * inside[b];
  }
  for (std::size_t b = 0; b < row.sections.size(); ++b) {
    const Section& section = row.sections[b];
    const double base = section.closed ? inside[b] : along;
    for (std::int64_t j = section.begin; j < section.end; ++j)
      ds[static_cast<std::size_t>(j)] = row.gate[b] * inner(row, b, s[j]) * (grad[j] - base);
    if (section.closed)
      ds[static_cast<std::size_t>(section.end)] = row.gate[b] * (inside[b] - along);
  }
  return ds;
}

std::vector<double> parallel(const Problem& p) {
  std::vector<double> out(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim));
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const auto w = grouped_softmax(scores_of(p, t, h), p.is_landmark, p.past + t, p.drop_empty);
      double* o = out.data() + (t * p.heads + h) * p.value_dim;
      for (std::int64_t j = 0; j <= p.past + t; ++j)
        if (w[j] != 0) add_scaled(w[j], value(p, j, h), o, p.value_dim);
    }
  return out;
}

std::vector<double> two_level(const Problem& p) {
  std::vector<double> out(static_cast<std::size_t>(p.tokens * p.heads * p.value_dim));
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const auto s = scores_of(p, t, h);
      const std::int64_t own = p.past + t;
      double* acc = out.data() + (t * p.heads + h) * p.value_dim;
      double top = -kInfinity, sum = 0;
      // Adds weight e^score, of which each value has a share; `empty` adds to the sum alone.
      const auto absorb = [&](double score, std::int64_t begin, std::int64_t end, double base) {
        const double higher = std::max(top, score);
        if (higher == -kInfinity) return;
        const double fade = std::exp(top - higher), weight = std::exp(score - higher);
        for (std::int64_t i = 0; i < p.value_dim; ++i) acc[i] *= fade;
        for (std::int64_t j = begin; j < end; ++j)
          add_scaled(weight * std::exp(s[j] - base), value(p, j, h), acc, p.value_dim);
        sum = sum * fade + weight;
        top = higher;
      };
      std::int64_t begin = 0;
      for (std::int64_t j = 0; j <= own; ++j) {
        if (p.is_landmark[j] == 0) continue;
        if (j < own && (j > begin || !p.drop_empty)) absorb(s[j], begin, j, log_sum(s, begin, j));
        if (j < own) begin = j + 1;
      }
      const std::int64_t end = own + (p.is_landmark[own] ? 0 : 1);
      if (end > begin) absorb(log_sum(s, begin, end), begin, end, log_sum(s, begin, end));
      for (std::int64_t i = 0; sum > 0 && i < p.value_dim; ++i) acc[i] /= sum;
    }
  return out;
}

Gradients gradients(const Problem& p, std::span<const double> grad_out) {
  Gradients d{std::vector<double>(p.q.size()), std::vector<double>(p.k.size()),
              std::vector<double>(p.v.size())};
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const auto s = scores_of(p, t, h);
      const std::int64_t own = p.past + t;
      const double* go = grad_out.data() + (t * p.heads + h) * p.value_dim;
      const auto w = grouped_softmax(s, p.is_landmark, own, p.drop_empty);
      std::vector<double> slope(s.size());  // dP
      for (std::int64_t j = 0; j <= own; ++j) {
        slope[j] = dot(go, value(p, j, h), p.value_dim);
        if (w[j] != 0)
          add_scaled(w[j], go, d.v.data() + kv_index(p, j, h) * p.value_dim, p.value_dim);
      }
      const auto ds = grouped_softmax_gradient(s, p.is_landmark, own, p.drop_empty, slope);
      for (std::int64_t j = 0; j <= own; ++j) {
        if (ds[j] == 0) continue;
        add_scaled(p.scale * ds[j], key(p, j, h), d.q.data() + (t * p.heads + h) * p.key_dim,
                   p.key_dim);
        add_scaled(p.scale * ds[j], query(p, t, h), d.k.data() + kv_index(p, j, h) * p.key_dim,
                   p.key_dim);
      }
    }
  return d;
}

}  // namespace everlong::landmark::reference
