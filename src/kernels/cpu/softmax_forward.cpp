#include "kernels/cpu/softmax_block.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax_forward.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <cmath>

#include "kernels/cpu/softmax_few_rows-inl.h"
#include "kernels/cpu/softmax_forward_scratch.h"
#include "kernels/cpu/softmax_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::cpu::HWY_NAMESPACE {
namespace {

using Scratch = ForwardScratch;

void pack_queries(const SoftmaxShape& shape, const Rows& q, int rows, const Scratch& s) {
  const float factor = shape.scale * kLog2e;
  if (rows > kFewRows) return transpose_rows(q, 0, rows, shape.key_dim, factor, s.q);
  for (int r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < padded(shape.key_dim); ++c)
      s.q[r * kRow + c] = c < shape.key_dim ? factor * element(q, r, c) : 0.0F;
}

// Takes the scores of `lanes * kVecs` queries with a panel of keys to exp(score - maximum).
template <int kVecs>
HWY_INLINE void score_panel(const SoftmaxShape& shape, const Scratch& s, const Intervals& sees,
                            std::int64_t first, std::int64_t keys, const float* bias) {
  const F d;
  const hn::RebindToSigned<F> integers;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V hidden = hn::Set(d, -kInf);
  V top[kVecs], begin[kVecs], end[kVecs];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    top[v] = hn::LoadU(d, s.top + first + v * lanes);
    begin[v] = hn::ConvertTo(d, hn::LoadU(integers, sees.begin + first + v * lanes));
    end[v] = hn::ConvertTo(d, hn::LoadU(integers, sees.end + first + v * lanes));
  }
  const Span seen = seen_by(sees, first, first + kVecs * lanes);
  for (std::int64_t j = 0; j < keys; j += kRowBlock) {
    float* to = s.p + j * kSide + first;
    if (j + kRowBlock <= seen.begin || j >= seen.end) {
      for (int r = 0; r < kRowBlock; ++r)
        for (int v = 0; v < kVecs; ++v) hn::StoreU(hidden, d, to + r * kSide + v * lanes);
      continue;
    }
    V c[kRowBlock][kVecs];
#pragma GCC unroll 12
    for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) c[r][v] = hn::Zero(d);
    multiply<kRowBlock, kVecs, kRow, 1, kSide>(d, s.k + j * kRow, s.q + first, shape.key_dim, c);
#pragma GCC unroll 12
    for (int r = 0; r < kRowBlock; ++r) {
      const V key = hn::Set(d, static_cast<float>(j + r));
      const V extra = hn::Set(d, bias != nullptr && j + r < keys ? kLog2e * bias[j + r] : 0.0F);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        if (bias != nullptr)  // -inf hides a key whatever its score, also NaN
          c[r][v] = hn::IfThenElse(hn::Eq(extra, hidden), hidden, hn::Add(c[r][v], extra));
        if (sees.masked)
          c[r][v] =
              hn::IfThenElse(hn::And(hn::Ge(key, begin[v]), hn::Lt(key, end[v])), c[r][v], hidden);
        top[v] = hn::Max(top[v], c[r][v]);
        hn::StoreU(c[r][v], d, to + r * kSide + v * lanes);
      }
    }
  }
  V sum[kVecs];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    const V old = hn::LoadU(d, s.top + first + v * lanes);
    hn::StoreU(top[v], d, s.top + first + v * lanes);
    top[v] = hn::IfThenZeroElse(hn::Eq(top[v], hidden), top[v]);  // no inf - inf in blind rows
    const V fade = exp2(d, hn::Sub(old, top[v]));
    hn::StoreU(fade, d, s.fade + first + v * lanes);
    sum[v] = hn::Mul(hn::LoadU(d, s.sum + first + v * lanes), fade);
  }
  for (std::int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* at = s.p + j * kSide + first + v * lanes;
      const V p = exp2(d, hn::Sub(hn::LoadU(d, at), top[v]));
      hn::StoreU(p, d, at);
      sum[v] = hn::Add(sum[v], p);
    }
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) hn::StoreU(sum[v], d, s.sum + first + v * lanes);
}

// One tile against a panel whose keys and values are copied; `finite`: the values are.
void absorb_panel(const SoftmaxShape& shape, const ForwardTile& tile, std::int64_t keys,
                  const float* bias, const Intervals& sees, bool finite) {
  const Scratch& s = tile.scratch;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  std::int64_t first = 0;
  for (; first + lanes < tile.rows; first += 2 * lanes)
    score_panel<2>(shape, s, sees, first, keys, bias);
  if (first < tile.rows) score_panel<1>(shape, s, sees, first, keys, bias);

  const bool careful = !finite && (sees.masked || bias != nullptr);
  const std::int64_t stride = padded(shape.value_dim);
  for (std::int64_t r = 0; r < tile.rows; r += kRowBlock) {
    const Span seen = sees.masked ? seen_by(sees, r, r + kRowBlock) : Span{0, keys};
    if (seen.empty()) continue;  // the factor is 1
    const float *p = s.p + seen.begin * kSide + r, *v = s.v + seen.begin * kRow;
    const std::int64_t depth = seen.end - seen.begin;
    if (careful)
      add_product_carefully<1, kSide>(p, p, v, depth, shape.value_dim, s.o + r * stride, stride,
                                      s.fade + r);
    else
      add_product<1, kSide>(p, v, depth, shape.value_dim, s.o + r * stride, stride, s.fade + r);
  }
}

void absorb_run(const SoftmaxShape& shape, ForwardTile* tiles, int count, const KeyRun& run) {
  std::int64_t begin = run.count, end = 0;
  for (int t = 0; t < count; ++t) {
    const Sight& sight = tiles[t].sight;
    for (int r = 0; r < tiles[t].rows; ++r)
      if (sight.begin[r] < sight.end[r]) {
        begin = std::min(begin, std::max<std::int64_t>(sight.begin[r], 0));
        end = std::max(end, std::min(sight.end[r], run.count));
      }
    tiles[t].scratch.k = tiles[0].scratch.k;  // one copy for all
    tiles[t].scratch.v = tiles[0].scratch.v;
    tiles[t].scratch.p = tiles[0].scratch.p;
  }
  Intervals sees;
  for (std::int64_t key = begin; key < end; key += kTileKeys) {
    const std::int64_t keys = std::min<std::int64_t>(kTileKeys, end - key);
    bool copied = false, finite = true;
    for (int t = 0; t < count; ++t) {
      const ForwardTile& tile = tiles[t];
      cut_sight(tile.sight, tile.rows, key, keys, sees);
      if (!sees.any) continue;
      if (tile.rows <= kFewRows) {
        absorb_few(shape, tile.scratch, tile.rows, run, key, keys, sees);
        copied = false;  // it may have copied on its own account, without looking for NaN
        continue;
      }
      if (!copied) {
        copy_rows(run.k, key, keys, shape.key_dim, tile.scratch.k);
        finite = copy_rows(run.v, key, keys, shape.value_dim, tile.scratch.v);
        copied = true;
      }
      absorb_panel(shape, tile, keys, run.bias == nullptr ? nullptr : run.bias + key, sees, finite);
    }
  }
}

void write_rows(const SoftmaxShape& shape, const Scratch& s, int rows, const MutableRows& o,
                const MutableRows& lse) {
  constexpr float kLn2 = 0.693147181F;
  for (int r = 0; r < rows; ++r) {
    const float sum = s.sum[r];
    store_row(o, r, shape.value_dim, s.o + r * padded(shape.value_dim), sum == 0 ? 0 : 1 / sum);
    if (lse.data != nullptr)
      static_cast<float*>(lse.data)[lse.at(r)] =
          sum == 0 ? -kInf : kLn2 * (s.top[r] + std::log2(sum));
  }
}

void read_rows(const SoftmaxShape& shape, const Scratch& s, int rows, const Rows& o,
               const Rows& lse) {
  for (int r = 0; r < rows; ++r) {
    s.top[r] = kLog2e * number(lse, r);
    if (s.top[r] == -kInf) continue;
    s.sum[r] = 1;
    for (int c = 0; c < shape.value_dim; ++c)
      s.o[r * padded(shape.value_dim) + c] = element(o, r, c);
  }
}

}  // namespace
}  // namespace everlong::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::cpu {
namespace {
HWY_EXPORT(pack_queries);
HWY_EXPORT(absorb_run);
HWY_EXPORT(write_rows);
HWY_EXPORT(read_rows);
}  // namespace

std::int64_t SoftmaxForward::scratch_bytes(int key_dim, int value_dim) {
  return ForwardScratch::floats(key_dim, value_dim) * static_cast<std::int64_t>(sizeof(float));
}

SoftmaxForward::SoftmaxForward(const SoftmaxShape& shape, void* scratch)
    : shape_(shape), scratch_(scratch) {}

void SoftmaxForward::begin(const Rows& q, int rows) {
  rows_ = rows;
  HWY_DYNAMIC_DISPATCH(pack_queries)(shape_, q, rows, {scratch_, shape_.key_dim, shape_.value_dim});
  restart();
}

void SoftmaxForward::restart() {
  const ForwardScratch s(scratch_, shape_.key_dim, shape_.value_dim);
  const int rows = (rows_ + 11) / 12 * 12;  // whole blocks are read
  std::fill_n(s.o, static_cast<std::size_t>(rows) * ((shape_.value_dim + 31) / 32 * 32), 0.0F);
  std::fill(s.top, s.sum, -std::numeric_limits<float>::infinity());
  std::fill(s.sum, s.fade, 0.0F);
}

void SoftmaxForward::resume(const Rows& o, const Rows& lse) {
  HWY_DYNAMIC_DISPATCH(read_rows)
  (shape_, {scratch_, shape_.key_dim, shape_.value_dim}, rows_, o, lse);
}

void SoftmaxForward::absorb(const KeyRun& keys, const Sight& sight) {
  absorb_together({this, 1}, keys, {&sight, 1});
}

void SoftmaxForward::absorb_together(std::span<SoftmaxForward> tiles, const KeyRun& keys,
                                     std::span<const Sight> sights) {
  ForwardTile list[kMostTogether];
  const auto count = std::min<std::size_t>(tiles.size(), kMostTogether);
  for (std::size_t t = 0; t < count; ++t) {
    const SoftmaxForward& tile = tiles[t];
    list[t] = {{tile.scratch_, tile.shape_.key_dim, tile.shape_.value_dim}, tile.rows_, sights[t]};
  }
  if (count > 0)
    HWY_DYNAMIC_DISPATCH(absorb_run)(tiles[0].shape_, list, static_cast<int>(count), keys);
}

void SoftmaxForward::finish(const MutableRows& o, const MutableRows& lse) const {
  HWY_DYNAMIC_DISPATCH(write_rows)
  (shape_, {scratch_, shape_.key_dim, shape_.value_dim}, rows_, o, lse);
}

void softmax_merge(const MutableRows& o_a, const MutableRows& lse_a, const Rows& o_b,
                   const Rows& lse_b, int rows, int value_dim) {
  constexpr float kBlind = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < rows; ++r) {
    float* o = static_cast<float*>(o_a.data) + o_a.at(r);
    float& lse = static_cast<float*>(lse_a.data)[lse_a.at(r)];
    const float* other = static_cast<const float*>(o_b.data) + o_b.at(r);
    const float with = static_cast<const float*>(lse_b.data)[lse_b.at(r)];
    if (with == kBlind) continue;
    if (lse == kBlind) {
      std::copy(other, other + value_dim, o);
      lse = with;
      continue;
    }
    const float top = std::max(lse, with), a = std::exp(lse - top), b = std::exp(with - top);
    for (int c = 0; c < value_dim; ++c) o[c] = (a * o[c] + b * other[c]) / (a + b);
    lse = top + std::log(a + b);
  }
}

}  // namespace everlong::cpu
#endif
