#include "mechanisms/landmark/kernel_cpu_fused.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/landmark/kernel_cpu_fused_forward.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <cmath>

#include "kernels/cpu/softmax_tile-inl.h"

#ifndef EVERLONG_MECHANISMS_LANDMARK_FUSED_FORWARD_ONCE_
#define EVERLONG_MECHANISMS_LANDMARK_FUSED_FORWARD_ONCE_
namespace everlong::landmark {
namespace {

// Queries lie along the lanes.
struct FusedForwardScratch {
  static constexpr std::int64_t kSide = cpu::kTileRows, kCopy = cpu::kTileKeys * kKeyStride;
  float *k, *v;             // shared: [kTileKeys][kKeyStride]
  float* p;                 // shared: [kTileKeys][kSide]
  float *top, *sum, *fade;  // [kSide]: running maximum in units of log 2, sum, last factor
  float* o;                 // [kSide][padded value_dim], not yet divided

  FusedForwardScratch(float* shared, float* own)
      : k(shared),
        v(k + kCopy),
        p(v + kCopy),
        top(own),
        sum(top + kSide),
        fade(sum + kSide),
        o(fade + kSide) {}
};

}  // namespace
}  // namespace everlong::landmark
#endif

HWY_BEFORE_NAMESPACE();
namespace everlong::landmark::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace tile = cpu::HWY_NAMESPACE;
using tile::F;
using tile::V;
using Scratch = FusedForwardScratch;

// Scores of two vectors of queries with the keys [j, j + kRows), and their maximum.
template <int kRows>
HWY_INLINE void score_rows(const cpu::SoftmaxShape& shape, const Scratch& s,
                           const SectionView& section, const float* queries, std::int64_t first,
                           std::int64_t j, bool masked, const V (&seen)[2], V (&top)[2]) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V hidden = hn::Set(d, -tile::kInf);
  V c[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) c[r][0] = c[r][1] = hn::Zero(d);
  tile::multiply<kRows, 2, tile::kRow, 1, tile::kSide>(d, s.k + j * tile::kRow, queries + first,
                                                       shape.key_dim, c);
  if (masked || j + kRows > section.count) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V key = hn::Set(d, static_cast<float>(j + r));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) c[r][v] = hn::IfThenElse(hn::Lt(key, seen[v]), c[r][v], hidden);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      top[v] = hn::Max(top[v], c[r][v]);
      hn::StoreU(c[r][v], d, s.p + (j + r) * tile::kSide + first + v * lanes);
    }
}

// Scores of two vectors of queries with the section, and from them the weights of its tokens in the
// running sum: exp(score - section's maximum) times what the gate leaves of it.
void weigh(const cpu::SoftmaxShape& shape, const Scratch& s, const SectionView& section,
           const float* queries, std::int64_t first, bool masked) {
  const F d;
  const hn::RebindToSigned<F> integers;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V hidden = hn::Set(d, -tile::kInf), zero = hn::Zero(d);
  V top[2] = {hidden, hidden}, seen[2];
  for (int v = 0; v < 2; ++v)
    seen[v] = hn::ConvertTo(d, hn::LoadU(integers, section.seen + first + v * lanes));
  // Blocks of 63 or 50 tokens are no multiple of a row block: what is left takes a smaller one.
  std::int64_t j = 0;
  for (; section.count - j > 8; j += tile::kRowBlock)
    score_rows<tile::kRowBlock>(shape, s, section, queries, first, j, masked, seen, top);
  for (; section.count - j > 4; j += 8)
    score_rows<8>(shape, s, section, queries, first, j, masked, seen, top);
  if (j < section.count) score_rows<4>(shape, s, section, queries, first, j, masked, seen, top);
  V sum[2] = {zero, zero}, base[2], share[2];
  for (int v = 0; v < 2; ++v) base[v] = hn::IfThenZeroElse(hn::Eq(top[v], hidden), top[v]);
  for (j = 0; j < section.count; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* at = s.p + j * tile::kSide + first + v * lanes;
      const V e = tile::exp2(d, hn::Sub(hn::LoadU(d, at), base[v]));
      hn::StoreU(e, d, at);
      sum[v] = hn::Add(sum[v], e);
    }
  for (int v = 0; v < 2; ++v) {
    const std::int64_t at = first + v * lanes;
    const auto past = hn::Gt(hn::LoadU(d, section.past + at), zero);
    const auto empty = hn::Eq(sum[v], zero);
    V whole = hn::IfThenElse(past, hn::LoadU(d, section.gate + at), top[v]);
    if (section.drop_empty) whole = hn::IfThenElse(empty, hidden, whole);
    const V old = hn::LoadU(d, s.top + at), higher = hn::Max(old, whole);
    const V finite = hn::IfThenZeroElse(hn::Eq(higher, hidden), higher);
    const V fade = tile::exp2(d, hn::Sub(old, finite)), x = tile::exp2(d, hn::Sub(whole, finite));
    hn::StoreU(higher, d, s.top + at);
    hn::StoreU(fade, d, s.fade + at);
    hn::StoreU(
        hn::MulAdd(fade, hn::LoadU(d, s.sum + at), hn::IfThenElse(past, x, hn::Mul(x, sum[v]))), d,
        s.sum + at);
    share[v] = hn::IfThenZeroElse(
        empty,
        hn::IfThenElse(past, hn::Div(x, hn::IfThenElse(empty, hn::Set(d, 1.0F), sum[v])), x));
  }
  for (j = 0; j < section.count; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* at = s.p + j * tile::kSide + first + v * lanes;
      hn::StoreU(hn::Mul(hn::LoadU(d, at), share[v]), d, at);
    }
}

bool load_section(const cpu::SoftmaxShape& shape, const Scratch& s, const cpu::Rows& k,
                  const cpu::Rows& v, std::int64_t count) {
  tile::copy_rows(k, 0, count, shape.key_dim, s.k);
  return tile::copy_rows(v, 0, count, shape.value_dim, s.v);
}

void absorb_section(const cpu::SoftmaxShape& shape, const Scratch& s, const float* queries,
                    int rows, const SectionView& section, bool finite) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  const bool masked = !section.whole;
  for (std::int64_t first = 0; first < rows; first += 2 * lanes)
    weigh(shape, s, section, queries, first, masked);
  const std::int64_t stride = tile::padded(shape.value_dim);
  for (std::int64_t r = 0; r < rows; r += tile::kRowBlock) {
    std::int64_t depth = section.whole ? section.count : 0;
    for (std::int64_t i = r; masked && i < HWY_MIN(r + tile::kRowBlock, tile::kSide); ++i)
      depth = HWY_MAX(depth, HWY_MIN(section.seen[i], section.count));
    if (!finite && masked)
      tile::add_product_carefully<1, tile::kSide>(s.p + r, s.p + r, s.v, depth, shape.value_dim,
                                                  s.o + r * stride, stride, s.fade + r);
    else
      tile::add_product<1, tile::kSide>(s.p + r, s.v, depth, shape.value_dim, s.o + r * stride,
                                        stride, s.fade + r);
  }
}

void write_tile(const cpu::SoftmaxShape& shape, const Scratch& s, int rows,
                const cpu::MutableRows& o, const cpu::MutableRows& lse) {
  constexpr float kLn2 = 0.693147181F;
  for (int r = 0; r < rows; ++r) {
    const float sum = s.sum[r];
    tile::store_row(o, r, shape.value_dim, s.o + r * tile::padded(shape.value_dim),
                    sum == 0 ? 0 : 1 / sum);
    static_cast<float*>(lse.data)[lse.at(r)] =
        sum == 0 ? -tile::kInf : kLn2 * (s.top[r] + std::log2(sum));
  }
}

}  // namespace
}  // namespace everlong::landmark::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::landmark {
namespace {
HWY_EXPORT(load_section);
HWY_EXPORT(absorb_section);
HWY_EXPORT(write_tile);
}  // namespace

std::int64_t FusedForward::shared_floats() {
  return 2 * FusedForwardScratch::kCopy + cpu::kTileRows * cpu::kTileKeys;
}
std::int64_t FusedForward::scratch_floats(int value_dim) {
  return 3 * cpu::kTileRows + cpu::kTileRows * ((value_dim + 31) / 32 * 32);
}
FusedForward::FusedForward(const cpu::SoftmaxShape& shape, float* shared, float* scratch)
    : shape_(shape), shared_(shared), scratch_(scratch) {}

void FusedForward::begin() {
  const FusedForwardScratch s(shared_, scratch_);
  std::fill_n(s.top, cpu::kTileRows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum, cpu::kTileRows, 0.0F);
  std::fill_n(s.o, cpu::kTileRows * ((shape_.value_dim + 31) / 32 * 32), 0.0F);
}
bool FusedForward::load(const cpu::Rows& k, const cpu::Rows& v, std::int64_t count) {
  const FusedForwardScratch s(shared_, scratch_);
  return HWY_DYNAMIC_DISPATCH(load_section)(shape_, s, k, v, count);
}
void FusedForward::absorb(const float* queries, int rows, const SectionView& section, bool finite) {
  const FusedForwardScratch s(shared_, scratch_);
  HWY_DYNAMIC_DISPATCH(absorb_section)(shape_, s, queries, rows, section, finite);
}
void FusedForward::finish(int rows, const cpu::MutableRows& o, const cpu::MutableRows& lse) const {
  const FusedForwardScratch s(shared_, scratch_);
  HWY_DYNAMIC_DISPATCH(write_tile)(shape_, s, rows, o, lse);
}

}  // namespace everlong::landmark
#endif
