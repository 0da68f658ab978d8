// The pieces that forward and backward of the softmax block are made of, once per SIMD target.
// Matrices of a tile have fixed leading dimensions, so that addresses are constants of the code.
#if defined(EVERLONG_KERNELS_CPU_SOFTMAX_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_KERNELS_CPU_SOFTMAX_TILE_INL_H_
#undef EVERLONG_KERNELS_CPU_SOFTMAX_TILE_INL_H_
#else
#define EVERLONG_KERNELS_CPU_SOFTMAX_TILE_INL_H_
#endif

#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/softmax_block.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

// Accumulators of a product: kRowBlock rows of two vectors. 24 of AVX-512's 32 registers hide the
// latency of two units; with 16 registers there is room for 12.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
inline constexpr int kRowBlock = 12;
#else
inline constexpr int kRowBlock = 6;
#endif

// Copied vectors lie kRow floats apart: 17 cache lines, so that neighbours fall into other sets.
inline constexpr std::int64_t kRow = 272;
inline constexpr std::int64_t kSide = 96;  // of scores and of transposed operands
static_assert(kTileRows == kSide && kTileKeys == kSide && kSide % 12 == 0 && kMostDim <= kRow);

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.44269504F;

inline std::int64_t padded(std::int64_t dim) { return (dim + 31) / 32 * 32; }
inline std::int64_t row_blocks(std::int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// 2^x to 1 ulp; exactly 0 below 2^-125 and for -inf, NaN for NaN. x < 127.
HWY_INLINE V exp2(F d, V x) {
  // Adding 1.5 * 2^23 rounds to an integer, which ends in the low bits, here with the bias of an
  // exponent.
  const V magic = hn::Set(d, 12582912.0F + 127.0F);
  const V shifted = hn::Add(x, magic);
  const V f = hn::Sub(x, hn::Sub(shifted, magic));
  const hn::RebindToUnsigned<F> bits;
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(bits, shifted)));
  // Minimax of 2^f on [-1/2, 1/2], relative error 1.9e-9.
  V p = hn::Set(d, 1.5345812000853494e-4F);
  p = hn::MulAdd(p, f, hn::Set(d, 1.3399931219081813e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 9.61848895711658e-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 5.550328776965722e-2F));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022646890634244e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 6.931472057372674e-1F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.0F)), hn::Mul(p, power));
}

// c += a b: element (r, k) of a at r * kARow + k * kAStep, row k of b at k * kBRow.
template <int kRows, int kVecs, std::int64_t kARow, std::int64_t kAStep, std::int64_t kBRow>
HWY_INLINE void multiply(F d, const float* HWY_RESTRICT a, const float* HWY_RESTRICT b,
                         std::int64_t depth, V (&c)[kRows][kVecs]) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t k = 0; k < depth; ++k) {
    V row[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) row[v] = hn::LoadU(d, b + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V x = hn::Set(d, a[r * kARow]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) c[r][v] = hn::MulAdd(x, row[v], c[r][v]);
    }
    a += kAStep;
    b += kBRow;
  }
}

// One block of rows of c [.., ldc] becomes fade[r] c + a b (fade null: 1), a panel of columns a
// time.
template <int kVecs, std::int64_t kARow, std::int64_t kAStep>
HWY_INLINE void add_panel(F d, const float* a, const float* b, std::int64_t depth, float* c,
                          std::int64_t ldc, const float* fade) {
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V sum[kRowBlock][kVecs];
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = hn::LoadU(d, c + r * ldc + v * lanes);
      if (fade != nullptr) sum[r][v] = hn::Mul(sum[r][v], hn::Set(d, fade[r]));
    }
  multiply<kRowBlock, kVecs, kARow, kAStep, kRow>(d, a, b, depth, sum);
#pragma GCC unroll 12
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) hn::StoreU(sum[r][v], d, c + r * ldc + v * lanes);
}

template <std::int64_t kARow, std::int64_t kAStep>
HWY_INLINE void add_product(const float* a, const float* b, std::int64_t depth,
                            std::int64_t columns, float* c, std::int64_t ldc, const float* fade) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t n = 0;
  for (; n + lanes < columns; n += 2 * lanes)
    add_panel<2, kARow, kAStep>(d, a, b + n, depth, c + n, ldc, fade);
  if (n < columns) add_panel<1, kARow, kAStep>(d, a, b + n, depth, c + n, ldc, fade);
}

// The same where b may hold NaN or infinity that some rows must not see: what weighs 0 in
// `weight` (laid out as a) is left out instead of multiplied.
template <std::int64_t kARow, std::int64_t kAStep>
HWY_NOINLINE void add_product_carefully(const float* weight, const float* a, const float* b,
                                        std::int64_t depth, std::int64_t columns, float* c,
                                        std::int64_t ldc, const float* fade) {
  for (int r = 0; r < kRowBlock; ++r) {
    float* row = c + r * ldc;
    for (std::int64_t n = 0; fade != nullptr && n < columns; ++n) row[n] *= fade[r];
    for (std::int64_t k = 0; k < depth; ++k) {
      if (weight[r * kARow + k * kAStep] == 0) continue;
      const float x = a[r * kARow + k * kAStep];
      for (std::int64_t n = 0; n < columns; ++n) row[n] += x * b[k * kRow + n];
    }
  }
}

HWY_INLINE V load_bf16(F d, const std::uint16_t* from) {
  const hn::Rebind<std::uint16_t, F> half;
  const hn::RebindToUnsigned<F> bits;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(half, from))));
}

inline float to_float(std::uint16_t bf16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint16_t to_bf16(float value) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffU) > 0x7f800000U) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

inline float element(const Rows& x, std::int64_t row, std::int64_t column) {
  const std::int64_t i = x.at(row) + column;
  return x.dtype == DType::kBFloat16 ? to_float(static_cast<const std::uint16_t*>(x.data)[i])
                                     : static_cast<const float*>(x.data)[i];
}
inline float number(const Rows& x, std::int64_t row) {
  return static_cast<const float*>(x.data)[x.at(row)];
}

// Rows [first, first + count) into to [.., kRow] as fp32, with zeros behind dim and in the rows
// that fill the last block. True where all is finite.
HWY_INLINE bool copy_rows(const Rows& x, std::int64_t first, std::int64_t count, std::int64_t dim,
                          float* to) {
  const F d;
  const std::int64_t lanes = static_cast<std::int64_t>(hn::Lanes(d)), wide = padded(dim);
  const bool low = x.dtype == DType::kBFloat16;
  const V zero = hn::Zero(d);
  V broken = zero;  // x * 0 is NaN for NaN and infinity, and NaN stays
  for (std::int64_t r = 0; r < count; ++r, to += kRow) {
    const std::int64_t at = x.at(first + r);
    std::int64_t c = 0;
    if (low) {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(x.data) + at;
      for (; c + lanes <= dim; c += lanes) {
        const V value = load_bf16(d, from + c);
        broken = hn::MulAdd(value, zero, broken);
        hn::StoreU(value, d, to + c);
      }
    } else {
      const float* from = static_cast<const float*>(x.data) + at;
      for (; c + lanes <= dim; c += lanes) {
        const V value = hn::LoadU(d, from + c);
        broken = hn::MulAdd(value, zero, broken);
        hn::StoreU(value, d, to + c);
      }
    }
    if (c == wide) continue;
    for (std::int64_t tail = c; tail < wide; ++tail)
      to[tail] = tail < dim ? element(x, first + r, tail) : 0.0F;
    for (; c < wide; c += lanes) broken = hn::MulAdd(hn::LoadU(d, to + c), zero, broken);
  }
  for (std::int64_t r = count; r < row_blocks(count) * kRowBlock; ++r, to += kRow)
    std::memset(to, 0, static_cast<std::size_t>(wide) * sizeof(float));
  return hn::AllTrue(d, hn::Eq(broken, zero));
}

// factor times `count` rows into to [dim][kSide], a row a column; zeros in the columns behind.
HWY_INLINE void transpose_rows(const Rows& x, std::int64_t first, std::int64_t count,
                               std::int64_t dim, float factor, float* to) {
  for (std::int64_t r = 0; r < count; ++r) {
    const std::int64_t at = x.at(first + r);
    if (x.dtype == DType::kBFloat16) {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(x.data) + at;
      for (std::int64_t c = 0; c < dim; ++c) to[c * kSide + r] = factor * to_float(from[c]);
    } else {
      const float* from = static_cast<const float*>(x.data) + at;
      for (std::int64_t c = 0; c < dim; ++c) to[c * kSide + r] = factor * from[c];
    }
  }
  if (count == kSide) return;
  for (std::int64_t c = 0; c < dim; ++c)
    std::memset(to + c * kSide + count, 0, static_cast<std::size_t>(kSide - count) * sizeof(float));
}

// What the rows of a tile see of a panel of keys, in keys of the panel.
struct Intervals {
  std::int32_t begin[kSide], end[kSide];  // 0, 0: nothing
  bool any = false, masked = false;       // some row sees something; some row or key is left out
};

// For the `keys` keys from `first` of a run on. Rows behind `rows` see nothing.
inline void cut_sight(const Sight& sight, std::int64_t rows, std::int64_t first, std::int64_t keys,
                      Intervals& out) {
  out.any = false;
  out.masked = keys < kSide;
  for (std::int64_t r = 0; r < kSide; ++r) {
    std::int64_t begin = 0, end = 0;
    if (r < rows) {
      begin = HWY_MAX(sight.begin[r] - first, 0);
      end = HWY_MIN(sight.end[r] - first, keys);
      if (begin >= end) begin = end = 0;
      out.any = out.any || begin < end;
      out.masked = out.masked || end - begin != keys;
    }
    out.begin[r] = static_cast<std::int32_t>(begin);
    out.end[r] = static_cast<std::int32_t>(end);
  }
}

struct Span {
  std::int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// All that any of the rows [first, last) sees.
inline Span seen_by(const Intervals& sees, std::int64_t first, std::int64_t last) {
  Span span{kSide, 0};
  for (std::int64_t r = first; r < HWY_MIN(last, kSide); ++r)
    if (sees.begin[r] < sees.end[r]) {
      span.begin = HWY_MIN(span.begin, sees.begin[r]);
      span.end = HWY_MAX(span.end, sees.end[r]);
    }
  return span;
}

inline void store_row(const MutableRows& x, std::int64_t row, std::int64_t dim, const float* from,
                      float factor) {
  const std::int64_t at = x.at(row);
  if (x.dtype == DType::kBFloat16) {
    std::uint16_t* to = static_cast<std::uint16_t*>(x.data) + at;
    for (std::int64_t c = 0; c < dim; ++c) to[c] = to_bf16(factor * from[c]);
  } else {
    float* to = static_cast<float*>(x.data) + at;
    for (std::int64_t c = 0; c < dim; ++c) to[c] = factor * from[c];
  }
}

}  // namespace everlong::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggle
