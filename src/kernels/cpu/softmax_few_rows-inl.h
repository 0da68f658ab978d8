// Forward of a handful of rows (a decoding step): keys and values are read once, where they lie,
// and what bounds it is memory.
#if defined(EVERLONG_KERNELS_CPU_SOFTMAX_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_KERNELS_CPU_SOFTMAX_FEW_ROWS_INL_H_
#undef EVERLONG_KERNELS_CPU_SOFTMAX_FEW_ROWS_INL_H_
#else
#define EVERLONG_KERNELS_CPU_SOFTMAX_FEW_ROWS_INL_H_
#endif

#include <algorithm>

#include "hwy/cache_control.h"
#include "kernels/cpu/softmax_forward_scratch.h"
#include "kernels/cpu/softmax_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::cpu::HWY_NAMESPACE {

// Vectors of a panel as they are used: where they lie, or copied.
struct Vectors {
  const float* data;
  std::int64_t stride;
};

HWY_INLINE Vectors vectors_of(const Rows& x, std::int64_t first, std::int64_t count,
                              std::int64_t dim, float* copy) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  if (x.dtype == DType::kFloat32 && x.group == 1 && dim % lanes == 0)
    return {static_cast<const float*>(x.data) + x.at(first), x.outer};
  copy_rows(x, first, count, dim, copy);
  return {copy, kRow};
}

// Scores of `rows` rows with a panel of keys. Rows lie pages apart where heads lie between them,
// which no hardware prefetcher follows: the keys ahead and the values of this key are asked for.
template <int kRows>
HWY_INLINE void few_scores(const ForwardScratch& s, const Vectors& k, const Vectors& v,
                           std::int64_t keys, const SoftmaxShape& shape) {
  constexpr std::int64_t kAhead = 8, kLine = 16;
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t j = 0; j < keys; ++j) {
    const float* key = k.data + j * k.stride;
    for (std::int64_t c = 0; c < shape.value_dim; c += kLine)
      hwy::Prefetch(v.data + j * v.stride + c);
    for (std::int64_t c = 0; j + kAhead < keys && c < shape.key_dim; c += kLine)
      hwy::Prefetch(key + kAhead * k.stride + c);
    V sum[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
    for (std::int64_t c = 0; c < shape.key_dim; c += lanes) {
      const V x = hn::LoadU(d, key + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        sum[r] = hn::MulAdd(x, hn::LoadU(d, s.q + r * kRow + c), sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) s.p[r * kSide + j] = hn::GetLane(hn::SumOfLanes(d, sum[r]));
  }
}

// Columns [n, n + lanes * kVecs) of o of `kRows` rows from `row` on become fade o + p v over the
// keys of `seen`.
template <int kRows, int kVecs>
HWY_INLINE void few_columns(const ForwardScratch& s, int row, const Vectors& values,
                            const Span& seen, std::int64_t stride, std::int64_t n) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c)
      sum[r][c] = hn::Mul(hn::LoadU(d, s.o + (row + r) * stride + n + c * lanes),
                          hn::Set(d, s.fade[row + r]));
  for (std::int64_t j = seen.begin; j < seen.end; ++j) {
    V x[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c)
      x[c] = hn::LoadU(d, values.data + j * values.stride + n + c * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V p = hn::Set(d, s.p[(row + r) * kSide + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[r][c] = hn::MulAdd(x[c], p, sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c)
      hn::StoreU(sum[r][c], d, s.o + (row + r) * stride + n + c * lanes);
}

template <int kRows>
HWY_INLINE void few_values(const ForwardScratch& s, int row, const Vectors& values,
                           const Span& seen, std::int64_t dim) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  std::int64_t n = 0;
  for (; n + 4 * lanes <= dim; n += 4 * lanes)
    few_columns<kRows, 4>(s, row, values, seen, padded(dim), n);
  for (; n < dim; n += lanes) few_columns<kRows, 1>(s, row, values, seen, padded(dim), n);
}

inline void absorb_few(const SoftmaxShape& shape, const ForwardScratch& s, int rows,
                       const KeyRun& run, std::int64_t key, std::int64_t keys,
                       const Intervals& sees) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const Vectors k = vectors_of(run.k, key, keys, shape.key_dim, s.k);
  const Vectors v = vectors_of(run.v, key, keys, shape.value_dim, s.v);
  if (rows == 1) few_scores<1>(s, k, v, keys, shape);
  if (rows == 2) few_scores<2>(s, k, v, keys, shape);
  if (rows == 3) few_scores<3>(s, k, v, keys, shape);
  if (rows == 4) few_scores<4>(s, k, v, keys, shape);
  bool alike = run.bias == nullptr;  // all rows weigh the same keys
  for (int r = 0; r < rows; ++r) {
    float* p = s.p + r * kSide;
    const std::int64_t begin = sees.begin[r], end = sees.end[r];
    alike = alike && begin == sees.begin[0] && end == sees.end[0];
    std::fill(p, p + begin, -kInf);
    std::fill(p + end, p + kSide, -kInf);
    for (std::int64_t j = begin; run.bias != nullptr && j < end; ++j)
      p[j] = run.bias[key + j] == -kInf ? -kInf : p[j] + kLog2e * run.bias[key + j];
    V top = hn::Set(d, s.top[r]);
    for (std::int64_t j = 0; j < kSide; j += lanes) top = hn::Max(top, hn::LoadU(d, p + j));
    const float old = s.top[r];
    s.top[r] = hn::GetLane(hn::MaxOfLanes(d, top));
    const float base = s.top[r] == -kInf ? 0 : s.top[r];
    s.fade[r] = hn::GetLane(exp2(d, hn::Set(d, old - base)));
    V sum = hn::Zero(d);
    for (std::int64_t j = 0; j < kSide; j += lanes) {
      const V e = exp2(d, hn::Sub(hn::LoadU(d, p + j), hn::Set(d, base)));
      hn::StoreU(e, d, p + j);
      sum = hn::Add(sum, e);
    }
    s.sum[r] = s.sum[r] * s.fade[r] + hn::GetLane(hn::SumOfLanes(d, sum));
  }
  const Span all{sees.begin[0], sees.end[0]};
  if (alike && rows == 4) return few_values<4>(s, 0, v, all, shape.value_dim);
  if (alike && rows == 2) return few_values<2>(s, 0, v, all, shape.value_dim);
  for (int r = 0; r < rows; ++r) {
    if (run.bias == nullptr) {
      few_values<1>(s, r, v, {sees.begin[r], sees.end[r]}, shape.value_dim);
      continue;
    }
    const float fade = s.fade[r];  // a bias may hide a key in the middle, whose value is not read
    for (std::int64_t n = 0; n < shape.value_dim; ++n) s.o[r * padded(shape.value_dim) + n] *= fade;
    s.fade[r] = 1;
    for (std::int64_t j = sees.begin[r]; j < sees.end[r]; ++j)
      if (s.p[r * kSide + j] != 0) few_values<1>(s, r, v, {j, j + 1}, shape.value_dim);
  }
}

}  // namespace everlong::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggle
