// One token: S is read once and written once.
#if defined(EVERLONG_LIGHTNING_STEP_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_LIGHTNING_STEP_INL
#undef EVERLONG_LIGHTNING_STEP_INL
#else
#define EVERLONG_LIGHTNING_STEP_INL
#endif

#include "mechanisms/lightning/kernel_cpu_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::lightning::cpu {
namespace HWY_NAMESPACE {

// old + update, rounded up or down with the probabilities that make the mean right. Where S is
// large against its updates, rounding to nearest errs the same way step after step (always down for
// small ones), and a million steps add up to 2e-4 of S; this way they walk. The noise, less than
// half an ulp, comes from the bits of both numbers: same input, same bits. An update of zero
// changes nothing.
template <class D>
HWY_INLINE hn::Vec<D> add_dithered(D d, hn::Vec<D> old, hn::Vec<D> update) {
  const hn::RebindToUnsigned<D> du;
  const auto old_bits = hn::BitCast(du, old), update_bits = hn::BitCast(du, update);
  const auto mixed = hn::Mul(hn::Xor(hn::Add(old_bits, hn::ShiftLeft<9>(old_bits)), update_bits),
                             hn::Set(du, 0x9E3779B1));
  // The upper bits as a number in (1, 2), then in (-1/2, 1/2); 1: never a tie.
  const auto one_to_two = hn::BitCast(
      d, hn::Or(hn::Or(hn::ShiftRight<9>(mixed), hn::Set(du, 1)), hn::Set(du, 0x3F800000)));
  const auto noise = hn::Sub(one_to_two, hn::Set(d, 1.5F));
  const auto power = hn::BitCast(d, hn::And(old_bits, hn::Set(du, 0x7F800000)));
  const auto ulp = hn::Mul(power, hn::Set(d, 1.0F / (1 << 23)));
  const auto nothing = hn::Eq(update, hn::Zero(d));
  return hn::Add(old, hn::MulAdd(ulp, hn::IfThenZeroElse(nothing, noise), update));
}

// Columns [col, col + kVectors lanes). S + (lost S + k v), as in the chunks: see Update::kAdd.
template <int kVectors, bool kDither, class D, class T>
HWY_INLINE void step_columns(D d, const Step& s, std::int64_t col) {
  using V = hn::Vec<D>;
  const std::int64_t width = static_cast<std::int64_t>(hn::Lanes(d));
  const T *q = static_cast<const T*>(s.q), *k = static_cast<const T*>(s.k);
  V v[kVectors], sum[kVectors];
  for (int x = 0; x < kVectors; ++x) {
    v[x] = load_as(d, static_cast<const T*>(s.v) + col + x * width);
    sum[x] = hn::Zero(d);
  }
  const V lost = hn::Set(d, s.lost);
  for (std::int64_t i = 0; i < s.key_dim; ++i) {
    const V k_i = hn::Set(d, load_one(k + i)), q_i = hn::Set(d, load_one(q + i));
    const float* in = s.state_in == nullptr ? nullptr : s.state_in + i * s.in_stride + col;
    float* out = s.state_out == nullptr ? nullptr : s.state_out + i * s.out_stride + col;
    for (int x = 0; x < kVectors; ++x) {
      V next = hn::Mul(k_i, v[x]);
      if (in != nullptr) {
        const V old = hn::LoadU(d, in + x * width), update = hn::MulAdd(old, lost, next);
        if constexpr (kDither)
          next = add_dithered(d, old, update);
        else
          next = hn::Add(old, update);
      }
      if (out != nullptr) hn::StoreU(next, d, out + x * width);
      sum[x] = hn::MulAdd(q_i, next, sum[x]);
    }
  }
  for (int x = 0; x < kVectors; ++x)
    store_as(d, hn::Mul(sum[x], hn::Set(d, s.scale)), static_cast<T*>(s.o) + col + x * width);
}

template <bool kDither, class T>
void step_token(const Step& s) {
  // Whole rows where the registers hold them: memory is then read in one line.
  constexpr int kMany = 8;
  const Tag d;
  const hn::CappedTag<float, 1> one;
  std::int64_t col = 0;
  for (; col + kMany * kWidth <= s.value_dim; col += kMany * kWidth)
    step_columns<kMany, kDither, Tag, T>(d, s, col);
  for (; col + 2 * kWidth <= s.value_dim; col += 2 * kWidth)
    step_columns<2, kDither, Tag, T>(d, s, col);
  for (; col + kWidth <= s.value_dim; col += kWidth) step_columns<1, kDither, Tag, T>(d, s, col);
  for (; col < s.value_dim; ++col) step_columns<1, kDither, decltype(one), T>(one, s, col);
}

void step_any_type(const Step& step) {
  const bool wide = step.dtype == DType::kFloat32;
  const auto run = step.dither ? (wide ? &step_token<true, float> : &step_token<true, BFloat16>)
                               : (wide ? &step_token<false, float> : &step_token<false, BFloat16>);
  run(step);
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::lightning::cpu
HWY_AFTER_NAMESPACE();
#endif
