#include "mechanisms/landmark/kernel_cpu_fused.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/landmark/kernel_cpu_fused_backward.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <cmath>

#include "kernels/cpu/softmax_tile-inl.h"

#ifndef EVERLONG_MECHANISMS_LANDMARK_FUSED_BACKWARD_ONCE_
#define EVERLONG_MECHANISMS_LANDMARK_FUSED_BACKWARD_ONCE_
namespace everlong::landmark {
namespace {

// Keys lie along the lanes, and stay while the tiles of queries pass.
struct FusedBackwardScratch {
  static constexpr std::int64_t kSide = cpu::kTileRows, kCopy = cpu::kTileKeys * kKeyStride;
  static std::int64_t wide(std::int64_t dim) { return (dim + 31) / 32 * 32; }
  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim) {
    return kSide * (key_dim + value_dim + wide(key_dim) + wide(value_dim)) + kCopy +
           2 * kSide * kSide;
  }
  float *k_columns, *v_columns;  // transposed [dim][kSide]; k times scale log2(e)
  float* k;                      // [kTileKeys][kKeyStride]
  float *p, *ds;                 // [kSide][kSide]
  float *dk, *dv;                // [kTileKeys][padded dim]

  FusedBackwardScratch(float* base, std::int64_t key_dim, std::int64_t value_dim)
      : k_columns(base),
        v_columns(k_columns + kSide * key_dim),
        k(v_columns + kSide * value_dim),
        p(k + kCopy),
        ds(p + kSide * kSide),
        dk(ds + kSide * kSide),
        dv(dk + kSide * wide(key_dim)) {}
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
using Scratch = FusedBackwardScratch;

void pack_section(const cpu::SoftmaxShape& shape, float* scratch, const cpu::Rows& k,
                  const cpu::Rows& v, std::int64_t count) {
  const Scratch s(scratch, shape.key_dim, shape.value_dim);
  tile::transpose_rows(k, 0, count, shape.key_dim, shape.scale * tile::kLog2e, s.k_columns);
  tile::transpose_rows(v, 0, count, shape.value_dim, 1, s.v_columns);
  tile::copy_rows(k, 0, count, shape.key_dim, s.k);
  std::fill_n(s.dk, cpu::kTileKeys * tile::padded(shape.key_dim), 0.0F);
  std::fill_n(s.dv, cpu::kTileKeys * tile::padded(shape.value_dim), 0.0F);
}

// One block of rows of a b^T, a [rows][kRow], b transposed [depth][kSide], to [rows][kSide].
void multiply_block(const float* a, const float* b, std::int64_t depth, std::int64_t columns,
                    float* to) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t j = 0; j < columns; j += 2 * lanes) {
    V c[tile::kRowBlock][2];
#pragma GCC unroll 12
    for (int r = 0; r < tile::kRowBlock; ++r) c[r][0] = c[r][1] = hn::Zero(d);
    tile::multiply<tile::kRowBlock, 2, tile::kRow, 1, tile::kSide>(d, a, b + j, depth, c);
#pragma GCC unroll 12
    for (int r = 0; r < tile::kRowBlock; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) hn::StoreU(c[r][v], d, to + r * tile::kSide + j + v * lanes);
  }
}

// A row of scores and of slopes (dP) becomes weights and dS; returns the slope of the gate.
float slope_row(const SectionView& section, int row, float lse, float along, float* p, float* ds) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t columns = (section.count + lanes - 1) / lanes * lanes;
  const V zero = hn::Zero(d), hidden = hn::Set(d, -tile::kInf);
  const std::int64_t visible = HWY_MIN(section.seen[row], section.count);
  const V seen = hn::Set(d, static_cast<float>(visible));
  // x where it is seen, else `otherwise`; most vectors are seen as a whole.
  const auto where_seen = [&](std::int64_t j, V x, V otherwise) {
    if (j + lanes <= visible) return x;
    return hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(j)), seen), x, otherwise);
  };
  const bool past = section.past[row] != 0;
  const float total = tile::kLog2e * lse;
  V top = hidden;
  for (std::int64_t j = 0; past && j < columns; j += lanes)
    top = hn::Max(top, where_seen(j, hn::LoadU(d, p + j), hidden));
  const float largest = past ? hn::GetLane(hn::MaxOfLanes(d, top)) : total;
  const bool blind = lse == -tile::kInf;
  const V base = hn::Set(d, blind || largest == -tile::kInf ? 0.0F : largest);
  V sum = zero, mixed = zero;
  for (std::int64_t j = 0; j < columns; j += lanes) {
    const V e = where_seen(j, tile::exp2(d, hn::Sub(hn::LoadU(d, p + j), base)), zero);
    hn::StoreU(e, d, p + j);
    sum = hn::Add(sum, e);
    mixed = hn::Add(mixed, hn::IfThenZeroElse(hn::Eq(e, zero), hn::Mul(e, hn::LoadU(d, ds + j))));
  }
  float factor = blind ? 0.0F : 1.0F, from = along, gate_slope = 0;
  if (past) {
    const float all = hn::GetLane(hn::SumOfLanes(d, sum));
    const bool empty = all == 0;
    const float weight =
        blind || (empty && section.drop_empty) ? 0.0F : std::exp2(section.gate[row] - total);
    from = empty ? 0.0F : hn::GetLane(hn::SumOfLanes(d, mixed)) / all;
    factor = empty ? 0.0F : weight / all;
    gate_slope = weight * (from - along);
  }
  const V scale = hn::Set(d, factor), less = hn::Set(d, from);
  for (std::int64_t j = 0; j < columns; j += lanes) {
    const V e = hn::Mul(hn::LoadU(d, p + j), scale);
    hn::StoreU(e, d, p + j);
    const V slope = hn::Mul(e, hn::Sub(hn::LoadU(d, ds + j), less));
    hn::StoreU(hn::IfThenZeroElse(hn::Eq(e, zero), slope), d, ds + j);  // not 0 * NaN
  }
  return gate_slope;
}

void load_tile(const cpu::SoftmaxShape& shape, const cpu::Rows& q, const cpu::Rows& grad_o,
               int rows, float* loaded) {
  tile::copy_rows(q, 0, rows, shape.key_dim, loaded);
  tile::copy_rows(grad_o, 0, rows, shape.value_dim, loaded + Scratch::kSide * kKeyStride);
}

void absorb_tile(const cpu::SoftmaxShape& shape, float* scratch, const float* loaded, int rows,
                 const SectionView& section, const float* lse, const float* along, float* grad_q,
                 float* gate_slope) {
  const Scratch s(scratch, shape.key_dim, shape.value_dim);
  const float *q = loaded, *grad_o = loaded + Scratch::kSide * kKeyStride;
  const std::int64_t keys = section.count, key_stride = tile::padded(shape.key_dim),
                     value_stride = tile::padded(shape.value_dim);
  for (std::int64_t r = 0; r < rows; r += tile::kRowBlock) {
    multiply_block(q + r * tile::kRow, s.k_columns, shape.key_dim, keys, s.p + r * tile::kSide);
    multiply_block(grad_o + r * tile::kRow, s.v_columns, shape.value_dim, keys,
                   s.ds + r * tile::kSide);
    for (std::int64_t i = r; i < HWY_MIN(r + tile::kRowBlock, rows); ++i)
      gate_slope[i] = slope_row(section, static_cast<int>(i), lse[i], along[i],
                                s.p + i * tile::kSide, s.ds + i * tile::kSide);
    for (std::int64_t i = rows; i < r + tile::kRowBlock; ++i)  // behind the last row
      std::fill_n(s.ds + i * tile::kSide, tile::kSide, 0.0F);
    tile::add_product<tile::kSide, 1>(s.ds + r * tile::kSide, s.k, keys, shape.key_dim,
                                      grad_q + r * key_stride, key_stride, nullptr);
  }
  for (std::int64_t j = 0; j < keys; j += tile::kRowBlock) {
    tile::add_product<1, tile::kSide>(s.p + j, grad_o, rows, shape.value_dim,
                                      s.dv + j * value_stride, value_stride, nullptr);
    tile::add_product<1, tile::kSide>(s.ds + j, q, rows, shape.key_dim, s.dk + j * key_stride,
                                      key_stride, nullptr);
  }
}

void add_section(const cpu::SoftmaxShape& shape, float* scratch, std::int64_t count, float* grad_k,
                 float* grad_v) {
  const Scratch s(scratch, shape.key_dim, shape.value_dim);
  const std::int64_t keys = count * tile::padded(shape.key_dim),
                     values = count * tile::padded(shape.value_dim);
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));  // rows are whole vectors
  const V scale = hn::Set(d, shape.scale);
  for (std::int64_t i = 0; i < keys; i += lanes)
    hn::StoreU(hn::MulAdd(scale, hn::LoadU(d, s.dk + i), hn::LoadU(d, grad_k + i)), d, grad_k + i);
  for (std::int64_t i = 0; i < values; i += lanes)
    hn::StoreU(hn::Add(hn::LoadU(d, s.dv + i), hn::LoadU(d, grad_v + i)), d, grad_v + i);
}

}  // namespace
}  // namespace everlong::landmark::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::landmark {
namespace {
HWY_EXPORT(pack_section);
HWY_EXPORT(load_tile);
HWY_EXPORT(absorb_tile);
HWY_EXPORT(add_section);
}  // namespace

std::int64_t FusedBackward::scratch_floats(int key_dim, int value_dim) {
  return FusedBackwardScratch::floats(key_dim, value_dim);
}
FusedBackward::FusedBackward(const cpu::SoftmaxShape& shape, float* scratch)
    : shape_(shape), scratch_(scratch) {}

void FusedBackward::begin(const cpu::Rows& k, const cpu::Rows& v, std::int64_t count) {
  count_ = count;
  HWY_DYNAMIC_DISPATCH(pack_section)(shape_, scratch_, k, v, count);
}
void FusedBackward::load(const cpu::Rows& q, const cpu::Rows& grad_o, int rows, float* tile) const {
  HWY_DYNAMIC_DISPATCH(load_tile)(shape_, q, grad_o, rows, tile);
}
void FusedBackward::absorb(const float* tile, int rows, const SectionView& section,
                           const float* lse, const float* along, float* grad_q, float* gate_slope) {
  HWY_DYNAMIC_DISPATCH(absorb_tile)
  (shape_, scratch_, tile, rows, section, lse, along, grad_q, gate_slope);
}
void FusedBackward::finish(float* grad_k, float* grad_v) const {
  HWY_DYNAMIC_DISPATCH(add_section)(shape_, scratch_, count_, grad_k, grad_v);
}

}  // namespace everlong::landmark
#endif
