// Backward: segments from the last to the first. The states within a segment are recomputed from
// its checkpoint, then the gradient of the state runs backwards over them; then that of the
// statistics.
#if defined(EVERLONG_MEGALODON_BACKWARD_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_MEGALODON_BACKWARD_INL
#undef EVERLONG_MEGALODON_BACKWARD_INL
#else
#define EVERLONG_MEGALODON_BACKWARD_INL
#endif

#include "mechanisms/megalodon/kernel_cpu_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::megalodon::cpu {
namespace HWY_NAMESPACE {

// What one vector of channels of a segment reads and adds to.
struct SegmentLane {
  const float *u, *de;  // [tokens, padded]
  float* du;
  std::int64_t padded, tokens, plane;  // plane: floats between the coefficient planes
  float* states;                       // scratch [kModes][tokens][2][kWidth]
};

// s_t = conj(c) de_t + conj(q) s_{t+1}; du += a Re s; gradients of q, a, c as sums over time.
template <int kModes>
HWY_INLINE void backward_modes(const SegmentLane& lane, const float* coefficients,
                               const float* h_start, float* s_carried, float* sums) {
  const Tag d;
  const std::int64_t P = lane.padded, T = lane.tokens;
  Vec q_re[kModes], q_im[kModes], a[kModes];
  float* states[kModes];
  {
    Vec re[kModes], im[kModes];
#pragma GCC unroll 4
    for (int k = 0; k < kModes; ++k) {
      q_re[k] = hn::Load(d, coefficients + k * P);
      q_im[k] = hn::Load(d, coefficients + lane.plane + k * P);
      a[k] = hn::Load(d, coefficients + 2 * lane.plane + k * P);
      re[k] = hn::Load(d, h_start + 2 * k * P);
      im[k] = hn::Load(d, h_start + (2 * k + 1) * P);
      states[k] = lane.states + k * 2 * (kSegment + 1) * kWidth;
      hn::Store(re[k], d, states[k]);
      hn::Store(im[k], d, states[k] + kWidth);
    }
    for (std::int64_t t = 0; t < T; ++t) {
      const Vec x = hn::Load(d, lane.u + t * P);
#pragma GCC unroll 4
      for (int k = 0; k < kModes; ++k) {
        const Vec next =
            hn::MulAdd(q_re[k], re[k], hn::NegMulAdd(q_im[k], im[k], hn::Mul(a[k], x)));
        im[k] = hn::MulAdd(q_re[k], im[k], hn::Mul(q_im[k], re[k]));
        re[k] = next;
        hn::Store(re[k], d, states[k] + 2 * (t + 1) * kWidth);
        hn::Store(im[k], d, states[k] + (2 * (t + 1) + 1) * kWidth);
      }
    }
  }
  Vec c_re[kModes], c_im[kModes], s_re[kModes], s_im[kModes];
  Vec dq_re[kModes], dq_im[kModes], da[kModes], dc_re[kModes], dc_im[kModes];
#pragma GCC unroll 4
  for (int k = 0; k < kModes; ++k) {
    c_re[k] = hn::Load(d, coefficients + 3 * lane.plane + k * P);
    c_im[k] = hn::Load(d, coefficients + 4 * lane.plane + k * P);
    s_re[k] = hn::Load(d, s_carried + 2 * k * P);
    s_im[k] = hn::Load(d, s_carried + (2 * k + 1) * P);
    dq_re[k] = dq_im[k] = da[k] = dc_re[k] = dc_im[k] = hn::Zero(d);
  }
  for (std::int64_t t = T; t-- > 0;) {
    const Vec x = hn::Load(d, lane.u + t * P), de = hn::Load(d, lane.de + t * P);
    Vec du = hn::Load(d, lane.du + t * P);
#pragma GCC unroll 4
    for (int k = 0; k < kModes; ++k) {
      const float* at = states[k] + 2 * t * kWidth;  // h_{t-1}, then h_t
      const Vec before_re = hn::Load(d, at), before_im = hn::Load(d, at + kWidth);
      s_re[k] = hn::MulAdd(c_re[k], de, s_re[k]);
      s_im[k] = hn::NegMulAdd(c_im[k], de, s_im[k]);
      du = hn::MulAdd(a[k], s_re[k], du);
      da[k] = hn::MulAdd(x, s_re[k], da[k]);
      dq_re[k] = hn::MulAdd(s_re[k], before_re, hn::MulAdd(s_im[k], before_im, dq_re[k]));
      dq_im[k] = hn::MulAdd(s_im[k], before_re, hn::NegMulAdd(s_re[k], before_im, dq_im[k]));
      dc_re[k] = hn::MulAdd(de, hn::Load(d, at + 2 * kWidth), dc_re[k]);
      dc_im[k] = hn::NegMulAdd(de, hn::Load(d, at + 3 * kWidth), dc_im[k]);
      const Vec next = hn::MulAdd(q_re[k], s_re[k], hn::Mul(q_im[k], s_im[k]));
      s_im[k] = hn::MulSub(q_re[k], s_im[k], hn::Mul(q_im[k], s_re[k]));
      s_re[k] = next;
    }
    hn::Store(du, d, lane.du + t * P);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kModes; ++k) {
    hn::Store(s_re[k], d, s_carried + 2 * k * P);
    hn::Store(s_im[k], d, s_carried + (2 * k + 1) * P);
    const Vec grads[kPlanes] = {dq_re[k], dq_im[k], da[k], dc_re[k], dc_im[k]};
    for (std::int64_t p = 0; p < kPlanes; ++p) {
      float* to = sums + p * lane.plane + k * P;
      hn::Store(hn::Add(hn::Load(d, to), grads[p]), d, to);
    }
  }
}

// The average over one segment: du [tokens, padded] gains what comes through it.
inline void backward_average(const float* u, const float* de, float* du, const Block& b,
                             std::int64_t tokens, std::int64_t modes, const float* coefficients,
                             const float* omega, const float* h_start, float* s_carried,
                             float* sums, float* omega_sum, float* states) {
  constexpr int kTogether = 2;
  const Tag d;
  const std::int64_t P = b.padded;
  for (std::int64_t c = 0; c < P; c += kWidth) {
    const Vec w = hn::Load(d, omega + c);
    Vec dw = hn::Load(d, omega_sum + c);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Vec g = hn::Load(d, de + t * P + c);
      dw = hn::MulAdd(g, hn::Load(d, u + t * P + c), dw);
      hn::Store(hn::MulAdd(w, g, hn::Load(d, du + t * P + c)), d, du + t * P + c);
    }
    hn::Store(dw, d, omega_sum + c);
    const SegmentLane lane{u + c, de + c, du + c, P, tokens, modes * P, states};
    std::int64_t m = 0;
    for (; m + kTogether <= modes; m += kTogether)
      backward_modes<kTogether>(lane, coefficients + m * P + c, h_start + 2 * m * P + c,
                                s_carried + 2 * m * P + c, sums + m * P + c);
    for (; m < modes; ++m)
      backward_modes<1>(lane, coefficients + m * P + c, h_start + 2 * m * P + c,
                        s_carried + 2 * m * P + c, sums + m * P + c);
  }
}

struct NormSegment {
  std::int64_t tokens, all_groups, first_count;  // tokens before the segment's first
  const double *means, *scales;                  // of the segment's tokens [tokens, all groups]
  const double* mean_before;                     // before its first token [all groups]
};

// What the gradient of a token's group needs: sums over its channels, then what is added to all.
struct TokenSums {
  double direct, along, mean;  // of dy (1 + w); of that times (x - mu) r; the token's own mean
};

HWY_INLINE TokenSums token_sums(const float* x, const float* dy, const float* factor,
                                std::int64_t count, double mean, double r, float* dw, float* db) {
  const Tag d;
  const auto high = static_cast<float>(mean);
  const auto low = static_cast<float>(mean - static_cast<double>(high));
  const auto scale = static_cast<float>(r);
  Vec sum1 = hn::Zero(d), sum2 = hn::Zero(d), sum3 = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec value = hn::LoadU(d, x + i), grad = hn::LoadU(d, dy + i);
    const Vec plain =
        hn::Mul(hn::Sub(hn::Sub(value, hn::Set(d, high)), hn::Set(d, low)), hn::Set(d, scale));
    const Vec scaled = hn::Mul(grad, hn::LoadU(d, factor + i));
    sum1 = hn::Add(sum1, scaled);
    sum2 = hn::MulAdd(scaled, plain, sum2);
    sum3 = hn::Add(sum3, value);
    hn::StoreU(hn::MulAdd(grad, plain, hn::LoadU(d, dw + i)), d, dw + i);
    hn::StoreU(hn::Add(grad, hn::LoadU(d, db + i)), d, db + i);
  }
  TokenSums sums{static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum1))),
                 static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum2))),
                 static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum3)))};
  for (; i < count; ++i) {
    const float plain = (x[i] - high - low) * scale, scaled = dy[i] * factor[i];
    sums.direct += static_cast<double>(scaled);
    sums.along += static_cast<double>(scaled * plain);
    sums.mean += static_cast<double>(x[i]);
    dw[i] += dy[i] * plain;
    db[i] += dy[i];
  }
  sums.mean /= static_cast<double>(count);
  return sums;
}

// dy becomes dx = dy (1 + w) r + constant + slope (x - mean of the token).
HWY_INLINE void token_gradient(const float* x, float* dy, const float* factor, std::int64_t count,
                               double r, double constant, double slope, double token_mean) {
  const Tag d;
  const auto scale = static_cast<float>(r), add = static_cast<float>(constant),
             tilt = static_cast<float>(slope), center = static_cast<float>(token_mean);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec spread = hn::MulAdd(
        hn::Set(d, tilt), hn::Sub(hn::LoadU(d, x + i), hn::Set(d, center)), hn::Set(d, add));
    const Vec direct = hn::Mul(hn::LoadU(d, dy + i), hn::LoadU(d, factor + i));
    hn::StoreU(hn::MulAdd(direct, hn::Set(d, scale), spread), d, dy + i);
  }
  for (; i < count; ++i) dy[i] = dy[i] * factor[i] * scale + add + tilt * (x[i] - center);
}

// du becomes dx. x is the input of the norm; (grad_mean, grad_var) [all groups] run backwards. In
// passes, so that only their recurrence waits for the token behind.
inline void backward_normalise(const float* x, float* du, const Block& b, const NormSegment& s,
                               const float* gain, float* gain_sum, float* bias_sum,
                               double* grad_mean, double* grad_var) {
  const std::int64_t P = b.padded, d = b.group_width;
  TokenSums sums[kSegment];
  double constants[kSegment], slopes[kSegment];
  for (std::int64_t g = 0; g < b.groups; ++g) {
    const double* const means = s.means + b.group + g;
    const double* const scales = s.scales + b.group + g;
    for (std::int64_t t = 0; t < s.tokens; ++t)
      sums[t] = token_sums(x + t * P + g * d, du + t * P + g * d, gain + g * d, d,
                           means[t * s.all_groups], scales[t * s.all_groups], gain_sum + g * d,
                           bias_sum + g * d);
    double u = grad_mean[b.group + g], w = grad_var[b.group + g];
    for (std::int64_t t = s.tokens; t-- > 0;) {
      const double added = 1 / static_cast<double>(s.first_count + t + 1), kept = 1 - added;
      const double r = scales[t * s.all_groups];
      const double before = t > 0 ? means[(t - 1) * s.all_groups] : s.mean_before[b.group + g];
      const double step = sums[t].mean - before;
      u -= r * sums[t].direct;
      w -= r * r * sums[t].along / 2;
      constants[t] = added / static_cast<double>(d) * (u + 2 * kept * w * step);
      slopes[t] = added / static_cast<double>(d) * 2 * w;
      u = kept * (u - 2 * added * w * step);
      w = kept * w;
    }
    grad_mean[b.group + g] = u;
    grad_var[b.group + g] = w;
    for (std::int64_t t = 0; t < s.tokens; ++t)
      token_gradient(x + t * P + g * d, du + t * P + g * d, gain + g * d, d,
                     scales[t * s.all_groups], constants[t], slopes[t], sums[t].mean);
  }
}

inline void zero(float* x, std::int64_t count) { std::fill(x, x + count, 0.0F); }

template <class T>
void backward_typed(const NormEmaCall& call, const NormEmaGrads& grads, const Block& b,
                    float* scratch) {
  const std::int64_t P = b.padded, M = call.modes, G = call.groups, D = call.width();
  float *u = scratch, *de = u + kSegment * P, *du = de + kSegment * P;
  float *gain = du + kSegment * P, *bias = gain + P, *omega = bias + P, *gain_sum = omega + P;
  float *bias_sum = gain_sum + P, *omega_sum = bias_sum + P, *coefficients = omega_sum + P;
  float *sums = coefficients + kPlanes * M * P, *s_carried = sums + kPlanes * M * P;
  float* h_start = s_carried + 2 * M * P;
  float* states = h_start + 2 * M * P;  // [2 modes][kSegment + 1][2][kWidth]
  zero(gain_sum, 3 * P);
  zero(sums, kPlanes * M * P);
  if (G > 0) {
    read_row(call.gain + b.channel, b.width, P, gain);
    read_row(call.bias + b.channel, b.width, P, bias);
  }
  if (M > 0) {
    read_row(call.omega + b.channel, b.width, P, omega);
    read_planes(call.coefficients, kPlanes * M, D, b, coefficients);
  }
  std::int64_t segment_end = 0;
  const Tag tag;
  for (std::int64_t n = 0; n < call.sequences(); ++n) {
    const std::int64_t length = call.length(n), first = call.first(n);
    const std::int64_t segments = (length + kSegment - 1) / kSegment;
    segment_end += segments;
    if (M > 0)
      read_state(grads.grad_h == nullptr ? nullptr : grads.grad_h + n * D * 2 * M, M, b, s_carried);
    double *grad_mean = nullptr, *grad_var = nullptr;
    if (G > 0) {
      grad_mean = grads.grad_mean_in + n * G;
      grad_var = grads.grad_var_in + n * G;
      for (std::int64_t g = b.group; g < b.group + b.groups; ++g) {
        grad_mean[g] = grads.grad_mean == nullptr ? 0 : grads.grad_mean[n * G + g];
        grad_var[g] = grads.grad_var == nullptr ? 0 : grads.grad_var[n * G + g];
      }
    }
    const auto at = [&](const auto& view, std::int64_t t) {
      const std::int64_t row = call.offsets.empty() ? n : 0,
                         token = call.offsets.empty() ? t : first + t;
      return row * view.strides[1] + token * view.strides[2] + b.channel;
    };
    const auto read = [&](const ConstTensorView& view, std::int64_t t, std::int64_t tokens,
                          float* to) {
      if (view)
        read_rows(static_cast<const T*>(view.data) + at(view, t), view.strides[2], tokens, b.width,
                  P, to);
      else
        zero(to, tokens * P);
    };
    for (std::int64_t index = segments; index-- > 0;) {
      const std::int64_t t0 = index * kSegment, tokens = std::min(kSegment, length - t0);
      read(grads.grad_u, t0, tokens, du);
      if (M > 0) {
        read(call.x, t0, tokens, u);
        for (std::int64_t t = 0; G > 0 && t < tokens; ++t) {
          float* row = u + t * P;
          for (std::int64_t g = 0; g < b.groups; ++g) {
            const std::int64_t stat = (first + t0 + t) * G + b.group + g;
            standardise(row + g * b.group_width, b.group_width, grads.means[stat],
                        grads.scales[stat], row + g * b.group_width);
          }
          for (std::int64_t c = 0; c < P; c += kWidth)
            hn::Store(hn::MulAdd(hn::Load(tag, row + c), hn::Load(tag, gain + c),
                                 hn::Load(tag, bias + c)),
                      tag, row + c);
        }
        read(grads.grad_e, t0, tokens, de);
        read_planes(grads.checkpoints + (segment_end - segments + index) * 2 * M * D, 2 * M, D, b,
                    h_start);
        backward_average(u, de, du, b, tokens, M, coefficients, omega, h_start, s_carried, sums,
                         omega_sum, states);
      }
      if (G > 0) {
        read(call.x, t0, tokens, u);
        const NormSegment s{tokens,
                            G,
                            call.counts[n] + t0,
                            grads.means + (first + t0) * G,
                            grads.scales + (first + t0) * G,
                            t0 > 0 ? grads.means + (first + t0 - 1) * G : call.mean + n * G};
        backward_normalise(u, du, b, s, gain, gain_sum, bias_sum, grad_mean, grad_var);
      }
      write_rows(du, P, tokens, b.width, grads.grad_x.strides[2],
                 static_cast<T*>(grads.grad_x.data) + at(grads.grad_x, t0));
    }
    if (M > 0) write_state(s_carried, M, b, grads.grad_h_in + n * D * 2 * M);
  }
  if (G > 0) {
    write_rows(gain_sum, P, 1, b.width, 0, grads.grad_gain + b.channel);
    write_rows(bias_sum, P, 1, b.width, 0, grads.grad_bias + b.channel);
  }
  if (M > 0) {
    write_rows(omega_sum, P, 1, b.width, 0, grads.grad_omega + b.channel);
    write_rows(sums, P, kPlanes * M, b.width, D, grads.grad_coefficients + b.channel);
  }
}

void backward_any(const NormEmaCall& call, const NormEmaGrads& grads, const Block& block,
                  float* scratch) {
  if (call.x.dtype == DType::kFloat32)
    backward_typed<float>(call, grads, block, scratch);
  else
    backward_typed<BFloat16>(call, grads, block, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::megalodon::cpu
HWY_AFTER_NAMESPACE();
#endif
