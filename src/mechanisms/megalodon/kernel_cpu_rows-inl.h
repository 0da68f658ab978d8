// Rows between memory of either dtype and padded fp32 scratch, and the statistics of a token.
#if defined(EVERLONG_MEGALODON_ROWS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_MEGALODON_ROWS_INL
#undef EVERLONG_MEGALODON_ROWS_INL
#else
#define EVERLONG_MEGALODON_ROWS_INL
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace everlong::megalodon::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, kLanes>;
using Vec = hn::Vec<Tag>;
constexpr std::int64_t kWidth = hn::MaxLanes(Tag());
static_assert(kLanes % kWidth == 0);

using BFloat16 = std::uint16_t;  // its bits

HWY_INLINE float load_one(const float* from) { return *from; }
HWY_INLINE float load_one(const BFloat16* from) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
HWY_INLINE Vec load_vec(const float* from) { return hn::LoadU(Tag(), from); }
HWY_INLINE Vec load_vec(const BFloat16* from) {
  const hn::Rebind<std::uint16_t, Tag> du16;
  const hn::RebindToUnsigned<Tag> du32;
  return hn::BitCast(Tag(), hn::ShiftLeft<16>(hn::PromoteTo(du32, hn::LoadU(du16, from))));
}
HWY_INLINE void store_vec(Vec value, float* to) { hn::StoreU(value, Tag(), to); }
// To nearest, ties to even; NaN stays NaN.
HWY_INLINE void store_vec(Vec value, BFloat16* to) {
  const hn::Rebind<std::uint16_t, Tag> du16;
  const hn::RebindToUnsigned<Tag> du32;
  const hn::RebindToSigned<Tag> di32;
  const auto bits = hn::BitCast(du32, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du32, 0x7FFF)), odd);
  const auto kept = hn::IfThenElse(hn::RebindMask(du32, hn::IsNaN(value)),
                                   hn::Or(bits, hn::Set(du32, 0x00400000)), rounded);
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di32, hn::ShiftRight<16>(kept))), du16, to);
}

// [rows, width] at a stride -> [rows, padded], zeros behind.
template <class T>
void read_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t width,
               std::int64_t padded, float* to) {
  for (std::int64_t r = 0; r < rows; ++r, from += stride, to += padded) {
    std::int64_t c = 0;
    for (; c + kWidth <= width; c += kWidth) hn::Store(load_vec(from + c), Tag(), to + c);
    for (; c < width; ++c) to[c] = load_one(from + c);
    for (; c < padded; ++c) to[c] = 0;
  }
}

template <class T>
void write_rows(const float* from, std::int64_t padded, std::int64_t rows, std::int64_t width,
                std::int64_t stride, T* to) {
  for (std::int64_t r = 0; r < rows; ++r, from += padded, to += stride) {
    std::int64_t c = 0;
    for (; c + kWidth <= width; c += kWidth) store_vec(hn::Load(Tag(), from + c), to + c);
    if (c == width) continue;
    HWY_ALIGN T last[kWidth];
    store_vec(hn::Load(Tag(), from + c), last);
    for (std::int64_t i = 0; c + i < width; ++i) to[c + i] = last[i];
  }
}

inline void read_row(const float* from, std::int64_t width, std::int64_t padded, float* to) {
  read_rows(from, 0, 1, width, padded, to);
}

struct Moments {
  double mean, var;
};

// Mean and population variance of `count` numbers in two passes.
HWY_INLINE Moments moments(const float* x, std::int64_t count) {
  const Tag d;
  Vec sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) sum = hn::Add(sum, hn::LoadU(d, x + i));
  double total = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
  for (; i < count; ++i) total += static_cast<double>(x[i]);
  const double mean = total / static_cast<double>(count);
  const auto center = static_cast<float>(mean);
  Vec square = hn::Zero(d);
  for (i = 0; i + kWidth <= count; i += kWidth) {
    const Vec off = hn::Sub(hn::LoadU(d, x + i), hn::Set(d, center));
    square = hn::MulAdd(off, off, square);
  }
  double squares = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, square)));
  for (; i < count; ++i) {
    const auto off = static_cast<double>(x[i] - center);
    squares += off * off;
  }
  // Around a center that was rounded to fp32.
  const double rounding = mean - static_cast<double>(center);
  return {mean, squares / static_cast<double>(count) - rounding * rounding};
}

// out = (x - mean) scale over a group; the mean in two parts, as fp32 alone would lose what is
// small beside it.
HWY_INLINE void standardise(const float* x, std::int64_t count, double mean, double scale,
                            float* out) {
  const Tag d;
  const auto high = static_cast<float>(mean);
  const auto low = static_cast<float>(mean - static_cast<double>(high));
  const auto s = static_cast<float>(scale);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec off = hn::Sub(hn::Sub(hn::LoadU(d, x + i), hn::Set(d, high)), hn::Set(d, low));
    hn::StoreU(hn::Mul(off, hn::Set(d, s)), d, out + i);
  }
  for (; i < count; ++i) out[i] = (x[i] - high - low) * s;
}

// (x + eps)^(-1/2) in place.
HWY_INLINE void inverse_roots(double* x, std::int64_t count, double eps) {
  const hn::ScalableTag<double> d;
  const auto width = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + width <= count; i += width)
    hn::StoreU(hn::Div(hn::Set(d, 1.0), hn::Sqrt(hn::Add(hn::LoadU(d, x + i), hn::Set(d, eps)))), d,
               x + i);
  for (; i < count; ++i) x[i] = 1 / std::sqrt(x[i] + eps);
}

// The planes of a block: [planes, padded], zeros behind, from [planes, all channels].
inline void read_planes(const float* from, std::int64_t planes, std::int64_t channels,
                        const Block& b, float* to) {
  for (std::int64_t p = 0; p < planes; ++p)
    read_row(from + p * channels + b.channel, b.width, b.padded, to + p * b.padded);
}

// h [D, M, 2] of one sequence <-> planes [M, 2, padded] of a block.
inline void read_state(const float* h, std::int64_t modes, const Block& b, float* planes) {
  for (std::int64_t m = 0; m < 2 * modes; ++m)
    for (std::int64_t c = 0; c < b.padded; ++c)
      planes[m * b.padded + c] =
          h == nullptr || c >= b.width ? 0.0F : h[(b.channel + c) * 2 * modes + m];
}
inline void write_state(const float* planes, std::int64_t modes, const Block& b, float* h) {
  for (std::int64_t c = 0; c < b.width; ++c)
    for (std::int64_t m = 0; m < 2 * modes; ++m)
      h[(b.channel + c) * 2 * modes + m] = planes[m * b.padded + c];
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::megalodon::cpu
HWY_AFTER_NAMESPACE();
#endif
