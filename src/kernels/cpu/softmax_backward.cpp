#include "kernels/cpu/softmax_block.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax_backward.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>

#include "kernels/cpu/softmax_tile-inl.h"

#ifndef EVERLONG_KERNELS_CPU_SOFTMAX_BACKWARD_ONCE_
#define EVERLONG_KERNELS_CPU_SOFTMAX_BACKWARD_ONCE_
namespace everlong::cpu {
namespace {

// Legend: keys lie along the lanes, and stay while the tiles of queries pass.
struct BackwardScratch {
  float *k_columns, *v_columns;  // transposed [dim][kSide]; k times scale log2(e)
  float* k;                      // [kTileKeys][kRow]
  float *q, *grad_o;             // [kTileRows][kRow]
  float *p, *ds;                 // [kTileRows][kSide]
  float *dk, *dv;                // [kTileKeys][padded dim]
  float *lse, *delta;            // [kTileRows]; lse in units of log 2
  float* bias;                   // [kTileKeys], in units of log 2
  float* flags;                  // [0]: 1 where the keys hold NaN or infinity; [1]: 1 with a bias

  static constexpr std::int64_t kCopy = kTileRows * 272, kScores = kTileRows * kTileKeys;
  static std::int64_t wide(std::int64_t dim) { return (dim + 31) / 32 * 32; }
  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim) {
    return kTileKeys * (key_dim + value_dim + wide(key_dim) + wide(value_dim)) + 3 * kCopy +
           2 * kScores + 4 * kTileRows;
  }

  BackwardScratch(void* base, std::int64_t key_dim, std::int64_t value_dim) {
    float* next = static_cast<float*>(base);
    const auto take = [&next](std::int64_t count) {
      float* mine = next;
      next += count;
      return mine;
    };
    k_columns = take(kTileKeys * key_dim);
    v_columns = take(kTileKeys * value_dim);
    k = take(kCopy);
    q = take(kCopy);
    grad_o = take(kCopy);
    p = take(kScores);
    ds = take(kScores);
    dk = take(kTileKeys * wide(key_dim));
    dv = take(kTileKeys * wide(value_dim));
    lse = take(kTileRows);
    delta = take(kTileRows);
    bias = take(kTileKeys);
    flags = take(kTileRows);
  }
};

}  // namespace
}  // namespace everlong::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace everlong::cpu::HWY_NAMESPACE {
namespace {

using Scratch = BackwardScratch;

void pack_keys(const SoftmaxShape& shape, const Scratch& s, const KeyRun& run) {
  const int keys = static_cast<int>(run.count);
  transpose_rows(run.k, 0, keys, shape.key_dim, shape.scale * kLog2e, s.k_columns);
  transpose_rows(run.v, 0, keys, shape.value_dim, 1, s.v_columns);
  s.flags[0] = copy_rows(run.k, 0, keys, shape.key_dim, s.k) ? 0.0F : 1.0F;
  s.flags[1] = run.bias == nullptr ? 0.0F : 1.0F;
  for (int j = 0; j < kTileKeys; ++j)
    s.bias[j] = run.bias != nullptr && j < keys ? kLog2e * run.bias[j] : 0.0F;
  std::fill(s.dk, s.dk + kTileKeys * padded(shape.key_dim), 0.0F);
  std::fill(s.dv, s.dv + kTileKeys * padded(shape.value_dim), 0.0F);
}

// P = exp(S - lse) and dS = P (dP - delta) of one block of rows and `lanes * kVecs` keys.
template <int kVecs>
HWY_INLINE void slope_block(const SoftmaxShape& shape, const Scratch& s, const Intervals& sees,
                            std::int64_t row, std::int64_t key) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V c[kRowBlock][kVecs], at[kVecs];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) at[v] = hn::Iota(d, static_cast<float>(key + v * lanes));
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) c[r][v] = hn::LoadU(d, s.bias + key + v * lanes);
  multiply<kRowBlock, kVecs, kRow, 1, kSide>(d, s.q + row * kRow, s.k_columns + key, shape.key_dim,
                                             c);
  float* p = s.p + row * kSide + key;
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r) {
    const V lse = hn::Set(d, s.lse[row + r]);
    const V begin = hn::Set(d, static_cast<float>(sees.begin[row + r]));
    const V end = hn::Set(d, static_cast<float>(sees.end[row + r]));
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      V e = exp2(d, hn::Sub(c[r][v], lse));
      if (s.flags[1] != 0)
        e = hn::IfThenZeroElse(hn::Eq(hn::LoadU(d, s.bias + key + v * lanes), hn::Set(d, -kInf)),
                               e);
      if (sees.masked) e = hn::IfThenElseZero(hn::And(hn::Ge(at[v], begin), hn::Lt(at[v], end)), e);
      hn::StoreU(e, d, p + r * kSide + v * lanes);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) c[r][v] = hn::Zero(d);
  multiply<kRowBlock, kVecs, kRow, 1, kSide>(d, s.grad_o + row * kRow, s.v_columns + key,
                                             shape.value_dim, c);
  float* ds = s.ds + row * kSide + key;
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r) {
    const V delta = hn::Set(d, s.delta[row + r]);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const V e = hn::LoadU(d, p + r * kSide + v * lanes);
      V slope = hn::Mul(e, hn::Sub(c[r][v], delta));
      slope = hn::IfThenZeroElse(hn::Eq(e, hn::Zero(d)), slope);  // not 0 * NaN
      hn::StoreU(slope, d, ds + r * kSide + v * lanes);
    }
  }
}

void slopes(const SoftmaxShape& shape, const Scratch& s, const Intervals& sees, std::int64_t rows,
            std::int64_t keys) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  for (std::int64_t r = 0; r < rows; r += kRowBlock) {
    const Span seen = sees.masked ? seen_by(sees, r, r + kRowBlock) : Span{0, keys};
    for (std::int64_t j = 0; j < keys; j += 2 * lanes) {
      if (j + 2 * lanes <= seen.begin || j >= seen.end) {
        for (int i = 0; i < kRowBlock; ++i)
          for (float* to : {s.p, s.ds}) std::fill_n(to + (r + i) * kSide + j, 2 * lanes, 0.0F);
        continue;
      }
      slope_block<2>(shape, s, sees, r, j);
    }
  }
}

// Rows that see any of the keys [first, last).
Span seers_of(const Intervals& sees, std::int64_t rows, std::int64_t first, std::int64_t last) {
  Span span{rows, 0};
  for (std::int64_t r = 0; r < rows; ++r)
    if (sees.begin[r] < last && sees.end[r] > first && sees.begin[r] < sees.end[r]) {
      span.begin = std::min(span.begin, r);
      span.end = r + 1;
    }
  return span;
}

void absorb_queries(const SoftmaxShape& shape, const Scratch& s, int keys, const QueryRows& queries,
                    const Sight& sight, float* grad_q) {
  Intervals sees;
  cut_sight(sight, queries.count, 0, keys, sees);
  if (!sees.any) return;
  const std::int64_t rows = queries.count;
  const std::int64_t key_stride = padded(shape.key_dim), value_stride = padded(shape.value_dim);
  const bool hides = sees.masked || s.flags[1] != 0;
  const bool care_k = hides && s.flags[0] != 0;
  const bool care_q = !copy_rows(queries.q, 0, rows, shape.key_dim, s.q) && hides;
  const bool care_o = !copy_rows(queries.grad_o, 0, rows, shape.value_dim, s.grad_o) && hides;
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    const float lse = r < rows ? number(queries.lse, r) : -kInf;
    s.lse[r] = lse == -kInf ? kInf : kLog2e * lse;  // blind rows: every probability is 0
    s.delta[r] = r < rows ? number(queries.delta, r) : 0;
  }
  slopes(shape, s, sees, rows, keys);

  for (std::int64_t j = 0; j < keys; j += kRowBlock) {
    const Span seers = sees.masked ? seers_of(sees, rows, j, j + kRowBlock) : Span{0, rows};
    if (seers.empty()) continue;
    const std::int64_t depth = seers.end - seers.begin, corner = seers.begin * kSide + j;
    const float *p = s.p + corner, *ds = s.ds + corner;
    const float *q = s.q + seers.begin * kRow, *go = s.grad_o + seers.begin * kRow;
    float *dk = s.dk + j * key_stride, *dv = s.dv + j * value_stride;
    if (care_o)
      add_product_carefully<1, kSide>(p, p, go, depth, shape.value_dim, dv, value_stride, nullptr);
    else
      add_product<1, kSide>(p, go, depth, shape.value_dim, dv, value_stride, nullptr);
    if (care_q)
      add_product_carefully<1, kSide>(p, ds, q, depth, shape.key_dim, dk, key_stride, nullptr);
    else
      add_product<1, kSide>(ds, q, depth, shape.key_dim, dk, key_stride, nullptr);
  }
  for (std::int64_t r = 0; r < rows; r += kRowBlock) {
    const Span seen = sees.masked ? seen_by(sees, r, r + kRowBlock) : Span{0, keys};
    if (seen.empty()) continue;
    const std::int64_t depth = seen.end - seen.begin, corner = r * kSide + seen.begin;
    const float* k = s.k + seen.begin * kRow;
    float* dq = grad_q + r * key_stride;
    if (care_k)
      add_product_carefully<kSide, 1>(s.p + corner, s.ds + corner, k, depth, shape.key_dim, dq,
                                      key_stride, nullptr);
    else
      add_product<kSide, 1>(s.ds + corner, k, depth, shape.key_dim, dq, key_stride, nullptr);
  }
}

void write_keys(const SoftmaxShape& shape, const Scratch& s, int keys, const MutableRows& grad_k,
                const MutableRows& grad_v) {
  for (int j = 0; j < keys; ++j) {
    store_row(grad_k, j, shape.key_dim, s.dk + j * padded(shape.key_dim), shape.scale);
    store_row(grad_v, j, shape.value_dim, s.dv + j * padded(shape.value_dim), 1);
  }
}

void deltas(const Rows& o, const Rows& grad_o, int rows, int value_dim, const MutableRows& delta) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const bool plain = o.dtype == DType::kFloat32 && grad_o.dtype == DType::kFloat32;
  for (int r = 0; r < rows; ++r) {
    V sum = hn::Zero(d);
    std::int64_t c = 0;
    for (; plain && c + lanes <= value_dim; c += lanes)
      sum =
          hn::MulAdd(hn::LoadU(d, static_cast<const float*>(o.data) + o.at(r) + c),
                     hn::LoadU(d, static_cast<const float*>(grad_o.data) + grad_o.at(r) + c), sum);
    float total = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; c < value_dim; ++c) total += element(o, r, c) * element(grad_o, r, c);
    static_cast<float*>(delta.data)[delta.at(r)] = total;
  }
}

void write_scaled(const float* from, std::int64_t stride, int rows, int dim, float factor,
                  const MutableRows& to) {
  for (int r = 0; r < rows; ++r) store_row(to, r, dim, from + r * stride, factor);
}

}  // namespace
}  // namespace everlong::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::cpu {
namespace {
HWY_EXPORT(pack_keys);
HWY_EXPORT(absorb_queries);
HWY_EXPORT(write_keys);
HWY_EXPORT(deltas);
HWY_EXPORT(write_scaled);
}  // namespace

std::int64_t SoftmaxBackward::scratch_bytes(int key_dim, int value_dim) {
  return BackwardScratch::floats(key_dim, value_dim) * static_cast<std::int64_t>(sizeof(float));
}

SoftmaxBackward::SoftmaxBackward(const SoftmaxShape& shape, void* scratch)
    : shape_(shape), scratch_(scratch) {}

void SoftmaxBackward::begin(const KeyRun& keys) {
  keys_ = static_cast<int>(keys.count);
  HWY_DYNAMIC_DISPATCH(pack_keys)(shape_, {scratch_, shape_.key_dim, shape_.value_dim}, keys);
}

void SoftmaxBackward::absorb(const QueryRows& queries, const Sight& sight, float* grad_q) {
  HWY_DYNAMIC_DISPATCH(absorb_queries)
  (shape_, {scratch_, shape_.key_dim, shape_.value_dim}, keys_, queries, sight, grad_q);
}

void SoftmaxBackward::finish(const MutableRows& grad_k, const MutableRows& grad_v) const {
  HWY_DYNAMIC_DISPATCH(write_keys)
  (shape_, {scratch_, shape_.key_dim, shape_.value_dim}, keys_, grad_k, grad_v);
}

void softmax_delta(const Rows& o, const Rows& grad_o, int rows, int value_dim,
                   const MutableRows& delta) {
  HWY_DYNAMIC_DISPATCH(deltas)(o, grad_o, rows, value_dim, delta);
}

void softmax_write_grad_q(const float* grad_q, const SoftmaxShape& shape, int rows,
                          const MutableRows& to) {
  HWY_DYNAMIC_DISPATCH(write_scaled)
  (grad_q, (shape.key_dim + 31) / 32 * 32, rows, shape.key_dim, shape.scale, to);
}

}  // namespace everlong::cpu
#endif
