// What the forms of the reference and its gradients share: indices, features, local attention.
#pragma once
#include <cmath>

#include "mechanisms/infini/reference.h"

namespace everlong::infini::reference {

using Vector = std::vector<double>;

inline double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
inline void add_scaled(double factor, const double* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// Features of `count` vectors of a row-major array.
Vector features(const Problem& p, const Vector& x);

// x [rows, heads, K] turned by the position in the segment, row r being token `from` + r of the
// sequence's rows; direction -1 turns back.
Vector rotate(const Problem& p, const Vector& x, std::int64_t heads, std::int64_t from,
              double direction = 1);

// Row r of the sequence, segment it belongs to, first row of that segment.
inline std::int64_t segment_of(const Problem& p, std::int64_t row) {
  return row / p.options.segment;
}
inline std::int64_t segment_begin(const Problem& p, std::int64_t row) {
  return segment_of(p, row) * p.options.segment;
}

// Offsets into the arrays.
inline std::int64_t at_q(const Problem& p, std::int64_t token, std::int64_t h) {
  return (token * p.heads + h) * p.key_dim;
}
inline std::int64_t at_o(const Problem& p, std::int64_t token, std::int64_t h) {
  return (token * p.heads + h) * p.value_dim;
}
inline std::int64_t at_k(const Problem& p, std::int64_t row, std::int64_t g) {
  return (row * p.kv_heads + g) * p.key_dim;
}
inline std::int64_t at_v(const Problem& p, std::int64_t row, std::int64_t g) {
  return (row * p.kv_heads + g) * p.value_dim;
}

// Probabilities of token t over the rows segment_begin .. open + t.
Vector local_weights(const Problem& p, const Vector& turned_q, const Vector& turned_k,
                     std::int64_t t, std::int64_t h);
// dot_t for every token and head, [tokens, heads, V].
Vector local_attention(const Problem& p);

// Whether head g's memory has nothing in it.
bool is_empty(const double* z, std::int64_t key_dim);
// sigma M / (sigma . z), zeros from an empty memory; `den` receives the divisor.
Vector retrieve(const double* feature, const double* M, const double* z, std::int64_t key_dim,
                std::int64_t value_dim, double* den = nullptr);
// gamma of one token.
double share_of_z(const Problem& p, const double* feature, const double* z);

// o of one token and head from its two halves.
void mix(const Problem& p, std::int64_t h, bool empty, const double* mem, const double* dot_t,
         double* o);

}  // namespace everlong::infini::reference
