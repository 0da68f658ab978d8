#include "mechanisms/landmark/kernel_cpu_gate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/landmark/kernel_cpu_gate.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <cmath>

#include "kernels/cpu/softmax_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::landmark::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace tile = cpu::HWY_NAMESPACE;
using tile::F;
using tile::V;

static_assert(kKeyStride == tile::kRow && kPanel == tile::kSide);

void pack(const cpu::Rows& q, int rows, int dim, float scale, float* to) {
  tile::transpose_rows(q, 0, rows, dim, scale, to);
}

void copy(const cpu::Rows& q, int rows, int dim, float* to) {
  tile::copy_rows(q, 0, rows, dim, to);
}

void copy_marked(const cpu::Rows& k, std::span<const Section> sections, int dim, float* to) {
  const std::int64_t wide = tile::padded(dim);
  std::int64_t row = 0;
  for (const Section& section : sections) {
    float* key = to + row++ * kKeyStride;
    for (std::int64_t c = 0; c < wide; ++c)
      key[c] = section.closed && c < dim ? tile::element(k, section.end, c) : 0.0F;
  }
  for (; row % tile::kRowBlock != 0; ++row)
    std::fill(to + row * kKeyStride, to + row * kKeyStride + wide, 0.0F);
}

void score(const float* landmarks, std::int64_t count, const float* queries, int dim,
           float* scores) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t j = 0; j < count; j += tile::kRowBlock)
    for (std::int64_t r = 0; r < tile::kSide; r += 2 * lanes) {
      V c[tile::kRowBlock][2];
      for (auto& row : c) row[0] = row[1] = hn::Zero(d);
      tile::multiply<tile::kRowBlock, 2, tile::kRow, 1, tile::kSide>(d, landmarks + j * tile::kRow,
                                                                     queries + r, dim, c);
      for (int i = 0; i < tile::kRowBlock; ++i)
        for (int v = 0; v < 2; ++v)
          hn::StoreU(c[i][v], d, scores + (j + i) * tile::kSide + r + v * lanes);
    }
}

void fold_one(const Fold& fold, const float* scores, const float* inner, const float* values,
              int rows, int dim) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (int r = 0; r < rows; ++r) {
    if (scores[r] == -tile::kInf) continue;
    const float top = std::max(fold.top[r], scores[r]);
    const float fade = std::exp(fold.top[r] - top), share = std::exp(scores[r] - top);
    fold.top[r] = top;
    fold.sum[r] = fade * fold.sum[r] + share;
    float* to = fold.values + r * fold.stride;
    const float* from = values + r * fold.stride;
    const bool empty = inner[r] == -tile::kInf;
    const V old_share = hn::Set(d, fade), new_share = hn::Set(d, empty ? 0.0F : share);
    for (std::int64_t c = 0; c < dim; c += lanes)
      hn::StoreU(
          hn::MulAdd(old_share, hn::LoadU(d, to + c), hn::Mul(new_share, hn::LoadU(d, from + c))),
          d, to + c);
  }
}

void write(const Fold& fold, int rows, int dim, const cpu::MutableRows& o,
           const cpu::MutableRows& lse) {
  for (int r = 0; r < rows; ++r) {
    const float sum = fold.sum[r];
    tile::store_row(o, r, dim, fold.values + r * fold.stride, sum == 0 ? 0 : 1 / sum);
    static_cast<float*>(lse.data)[lse.at(r)] = sum == 0 ? -tile::kInf : fold.top[r] + std::log(sum);
  }
}

void slopes_of(const float* values, std::int64_t stride, const cpu::Rows& grad_o, int rows, int dim,
               float* out) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (int r = 0; r < rows; ++r) {
    const float* mine = values + r * stride;
    V sum = hn::Zero(d);
    std::int64_t c = 0;
    if (grad_o.dtype == DType::kFloat32) {
      const float* go = static_cast<const float*>(grad_o.data) + grad_o.at(r);
      for (; c + lanes <= dim; c += lanes)
        sum = hn::MulAdd(hn::LoadU(d, mine + c), hn::LoadU(d, go + c), sum);
    }
    float total = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; c < dim; ++c) total += mine[c] * tile::element(grad_o, r, c);
    out[r] = total;
  }
}

void add_gradients(const float* slopes, std::int64_t count, const float* landmarks,
                   const float* queries, int rows, int dim, float* grad_q, std::int64_t q_stride,
                   float* grad_landmarks) {
  for (std::int64_t r = 0; r < rows; r += tile::kRowBlock)
    tile::add_product<1, tile::kSide>(slopes + r, landmarks, count, dim, grad_q + r * q_stride,
                                      q_stride, nullptr);
  for (std::int64_t j = 0; j < count; j += tile::kRowBlock)
    tile::add_product<tile::kSide, 1>(slopes + j * tile::kSide, queries, rows, dim,
                                      grad_landmarks + j * kKeyStride, kKeyStride, nullptr);
}

void store(const float* from, std::int64_t stride, int rows, int dim, const cpu::MutableRows& to) {
  for (int r = 0; r < rows; ++r) tile::store_row(to, r, dim, from + r * stride, 1);
}

}  // namespace
}  // namespace everlong::landmark::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::landmark {
namespace {
HWY_EXPORT(pack);
HWY_EXPORT(copy);
HWY_EXPORT(copy_marked);
HWY_EXPORT(score);
HWY_EXPORT(fold_one);
HWY_EXPORT(write);
HWY_EXPORT(slopes_of);
HWY_EXPORT(add_gradients);
HWY_EXPORT(store);
}  // namespace

void pack_queries(const cpu::Rows& q, int rows, int dim, float scale, float* to) {
  HWY_DYNAMIC_DISPATCH(pack)(q, rows, dim, scale, to);
}
void copy_queries(const cpu::Rows& q, int rows, int dim, float* to) {
  HWY_DYNAMIC_DISPATCH(copy)(q, rows, dim, to);
}
void copy_landmarks(const cpu::Rows& k, std::span<const Section> sections, int dim, float* to) {
  HWY_DYNAMIC_DISPATCH(copy_marked)(k, sections, dim, to);
}
void gate_scores(const float* landmarks, std::int64_t count, const float* queries, int dim,
                 float* scores) {
  HWY_DYNAMIC_DISPATCH(score)(landmarks, count, queries, dim, scores);
}
void begin_fold(const Fold& fold) {
  std::fill_n(fold.top, cpu::kTileRows, -std::numeric_limits<float>::infinity());
  std::fill_n(fold.sum, cpu::kTileRows, 0.0F);
  std::fill_n(fold.values, cpu::kTileRows * fold.stride, 0.0F);
}
void fold_section(const Fold& fold, const float* score, const float* inner, const float* values,
                  int rows, int dim) {
  HWY_DYNAMIC_DISPATCH(fold_one)(fold, score, inner, values, rows, dim);
}
void finish_fold(const Fold& fold, int rows, int dim, const cpu::MutableRows& o,
                 const cpu::MutableRows& lse) {
  HWY_DYNAMIC_DISPATCH(write)(fold, rows, dim, o, lse);
}
void section_slopes(const float* values, std::int64_t stride, const cpu::Rows& grad_o, int rows,
                    int dim, float* out) {
  HWY_DYNAMIC_DISPATCH(slopes_of)(values, stride, grad_o, rows, dim, out);
}
void gate_gradients(const float* slopes, std::int64_t count, const float* landmarks,
                    const float* queries, int rows, int dim, float* grad_q, std::int64_t q_stride,
                    float* grad_landmarks) {
  HWY_DYNAMIC_DISPATCH(add_gradients)
  (slopes, count, landmarks, queries, rows, dim, grad_q, q_stride, grad_landmarks);
}
void store_rows(const float* from, std::int64_t stride, int rows, int dim,
                const cpu::MutableRows& to) {
  HWY_DYNAMIC_DISPATCH(store)(from, stride, rows, dim, to);
}

}  // namespace everlong::landmark
#endif
