#include "kernels/cpu/rope_turn.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope_turn.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <hwy/highway.h>

#include <algorithm>

HWY_BEFORE_NAMESPACE();
namespace everlong::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;

void turn_one(const RopeTurn& turn, const float* x, const float* cos, const float* sin,
              float* out) {
  const F d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto sign = hn::Set(d, turn.sign);
  const bool split = turn.pairs == RopePairs::kHalfSplit;
  const std::int64_t step = split ? 1 : 2, other = split ? turn.count : 1;
  for (std::int64_t h = 0; h < turn.heads; ++h, x += turn.head_stride, out += turn.head_dim) {
    std::int64_t i = 0;
    for (; i + lanes <= turn.count; i += lanes) {
      const auto c = hn::LoadU(d, cos + i), s = hn::Mul(sign, hn::LoadU(d, sin + i));
      if (split) {
        const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + turn.count);
        hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, out + i);
        hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, out + i + turn.count);
      } else {
        hn::Vec<F> a, b;
        hn::LoadInterleaved2(d, x + 2 * i, a, b);
        hn::StoreInterleaved2(hn::NegMulAdd(b, s, hn::Mul(a, c)), hn::MulAdd(a, s, hn::Mul(b, c)),
                              d, out + 2 * i);
      }
    }
    for (; i < turn.count; ++i) {
      const float a = x[i * step], b = x[i * step + other], s = turn.sign * sin[i];
      out[i * step] = a * cos[i] - b * s;
      out[i * step + other] = b * cos[i] + a * s;
    }
    std::copy(x + 2 * turn.count, x + turn.head_dim, out + 2 * turn.count);
  }
}

}  // namespace
}  // namespace everlong::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::cpu {

HWY_EXPORT(turn_one);

void turn_token(const RopeTurn& turn, const float* x, const float* cos, const float* sin,
                float* out) {
  HWY_DYNAMIC_DISPATCH(turn_one)(turn, x, cos, sin, out);
}

}  // namespace everlong::cpu
#endif
