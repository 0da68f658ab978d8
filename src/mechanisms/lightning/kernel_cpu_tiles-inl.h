// Products of small matrices in registers, and elements of both dtypes.
#if defined(EVERLONG_LIGHTNING_TILES_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_LIGHTNING_TILES_INL
#undef EVERLONG_LIGHTNING_TILES_INL
#else
#define EVERLONG_LIGHTNING_TILES_INL
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace everlong::lightning::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;
constexpr std::int64_t kWidth = hn::MaxLanes(Tag());
// A tile is kTileRows x 2 vectors of sums, two vectors of B and a number of A: 8 rows fill 16 of 32
// registers (12 were not faster), 6 rows fill 12 of 16.
constexpr int kTileRows = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL ? 8 : 6;
constexpr std::int64_t kPanel = 2 * kWidth;  // columns of a panel

using BFloat16 = std::uint16_t;  // its bits

template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const BFloat16* from) {
  const hn::Rebind<std::uint16_t, D> du16;
  const hn::RebindToUnsigned<D> du32;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, hn::LoadU(du16, from))));
}
HWY_INLINE float load_one(const float* from) { return *from; }
HWY_INLINE float load_one(const BFloat16* from) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class D>
HWY_INLINE void store_as(D d, hn::Vec<D> value, float* to) {
  hn::StoreU(value, d, to);
}
// To nearest, ties to even; NaN stays NaN.
template <class D>
HWY_INLINE void store_as([[maybe_unused]] D d, hn::Vec<D> value, BFloat16* to) {
  const hn::Rebind<std::uint16_t, D> du16;
  const hn::RebindToUnsigned<D> du32;
  const hn::RebindToSigned<D> di32;
  const auto bits = hn::BitCast(du32, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du32, 0x7FFF)), odd);
  const auto nan = hn::Or(bits, hn::Set(du32, 0x00400000));
  const auto kept = hn::IfThenElse(hn::RebindMask(du32, hn::IsNaN(value)), nan, rounded);
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di32, hn::ShiftRight<16>(kept))), du16, to);
}

// The first `count` of a vector's numbers. stream: `to` is a vector's own and will not be read
// soon, so it need not be fetched into the cache first.
template <class T>
HWY_INLINE void store_some(Vec value, T* to, std::int64_t count, [[maybe_unused]] bool stream) {
  if (count >= kWidth) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (stream) {
        hn::Stream(value, Tag(), to);
        return;
      }
    }
    store_as(Tag(), value, to);
    return;
  }
  HWY_ALIGN T all[kWidth];
  store_as(Tag(), value, all);
  for (std::int64_t i = 0; i < count; ++i) to[i] = all[i];
}

template <int kRows, int kVectors>
struct Tile {
  Vec sum[kRows][kVectors];
};

template <int kRows, int kVectors>
HWY_INLINE void set_zero(Tile<kRows, kVectors>& tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = hn::Zero(Tag());
}

template <int kRows, int kVectors>
HWY_INLINE void load_tile(const float* from, std::int64_t stride, Tile<kRows, kVectors>& tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      tile.sum[i][v] = hn::Load(Tag(), from + i * stride + v * kWidth);
}
template <int kRows, int kVectors>
HWY_INLINE void store_tile(const Tile<kRows, kVectors>& tile, float* to, std::int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      hn::Store(tile.sum[i][v], Tag(), to + i * stride + v * kWidth);
}

template <int kRows, int kVectors>
HWY_INLINE void scale_tile(Vec factor, Tile<kRows, kVectors>& tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = hn::Mul(tile.sum[i][v], factor);
}
template <int kRows, int kVectors>
HWY_INLINE void add_tile(const float* from, std::int64_t stride, Tile<kRows, kVectors>& tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      tile.sum[i][v] = hn::Add(hn::Load(Tag(), from + i * stride + v * kWidth), tile.sum[i][v]);
}

// tile += A B over `depth`. A number of A is a[i * row + l * step], rows of B lie b_stride apart.
// row or step is a constant at every call.
template <int kRows, int kVectors>
HWY_INLINE void accumulate(const float* HWY_RESTRICT a, std::int64_t row, std::int64_t step,
                           const float* HWY_RESTRICT b, std::int64_t b_stride, std::int64_t depth,
                           Tile<kRows, kVectors>& tile) {
  const Tag d;
  for (std::int64_t l = 0; l < depth; ++l) {
    Vec b_l[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_l[v] = hn::Load(d, b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec a_il = hn::Set(d, a[i * row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = hn::MulAdd(a_il, b_l[v], tile.sum[i][v]);
    }
    a += step;
    b += b_stride;
  }
}

// Calls body.template run<rows>(first row) for tiles that cover [0, rows).
template <class Body>
HWY_INLINE void for_each_tile(std::int64_t rows, const Body& body) {
  std::int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) body.template run<kTileRows>(i);
  for (; i + 2 <= rows; i += 2) body.template run<2>(i);
  if (i < rows) body.template run<1>(i);
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::lightning::cpu
HWY_AFTER_NAMESPACE();
#endif
