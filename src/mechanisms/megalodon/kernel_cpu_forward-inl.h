// Forward: a tile of tokens is read, normalised, averaged and written.
#if defined(EVERLONG_MEGALODON_FORWARD_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_MEGALODON_FORWARD_INL
#undef EVERLONG_MEGALODON_FORWARD_INL
#else
#define EVERLONG_MEGALODON_FORWARD_INL
#endif

#include "mechanisms/megalodon/kernel_cpu_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::megalodon::cpu {
namespace HWY_NAMESPACE {

// Modes whose state and coefficients fit the registers, 7 vectors each and two for input and sum.
constexpr int kModesTogether = kWidth >= 16 ? 4 : 2;

// kModes modes of one vector of channels over a tile: h' = q h + a u, y += Re(c h').
template <int kModes>
HWY_INLINE void average_modes(const float* u, float* y, std::int64_t padded, std::int64_t tokens,
                              const float* coefficients, std::int64_t plane, float* h) {
  const Tag d;
  Vec re[kModes], im[kModes], q_re[kModes], q_im[kModes], a[kModes], c_re[kModes], c_im[kModes];
#pragma GCC unroll 4
  for (int k = 0; k < kModes; ++k) {
    const float* at = coefficients + k * padded;
    q_re[k] = hn::Load(d, at);
    q_im[k] = hn::Load(d, at + plane);
    a[k] = hn::Load(d, at + 2 * plane);
    c_re[k] = hn::Load(d, at + 3 * plane);
    c_im[k] = hn::Load(d, at + 4 * plane);
    re[k] = hn::Load(d, h + 2 * k * padded);
    im[k] = hn::Load(d, h + (2 * k + 1) * padded);
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Vec x = hn::Load(d, u + t * padded);
    Vec even = hn::Load(d, y + t * padded), odd = hn::Zero(d);
#pragma GCC unroll 4
    for (int k = 0; k < kModes; ++k) {
      const Vec next = hn::MulAdd(q_re[k], re[k], hn::NegMulAdd(q_im[k], im[k], hn::Mul(a[k], x)));
      im[k] = hn::MulAdd(q_re[k], im[k], hn::Mul(q_im[k], re[k]));
      re[k] = next;
      even = hn::MulAdd(c_re[k], re[k], even);
      odd = hn::NegMulAdd(c_im[k], im[k], odd);
    }
    hn::Store(hn::Add(even, odd), d, y + t * padded);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kModes; ++k) {
    hn::Store(re[k], d, h + 2 * k * padded);
    hn::Store(im[k], d, h + (2 * k + 1) * padded);
  }
}

// All modes of a block over a tile; y begins as omega u. h [M, 2, padded] moves on.
inline void average(const float* u, float* y, const Block& b, std::int64_t tokens,
                    std::int64_t modes, const float* coefficients, const float* omega, float* h) {
  const Tag d;
  const std::int64_t plane = modes * b.padded;
  for (std::int64_t c = 0; c < b.padded; c += kWidth) {
    const Vec w = hn::Load(d, omega + c);
    for (std::int64_t t = 0; t < tokens; ++t)
      hn::Store(hn::Mul(w, hn::Load(d, u + t * b.padded + c)), d, y + t * b.padded + c);
    std::int64_t m = 0;
    for (; m + kModesTogether <= modes; m += kModesTogether)
      average_modes<kModesTogether>(u + c, y + c, b.padded, tokens, coefficients + m * b.padded + c,
                                    plane, h + 2 * m * b.padded + c);
    for (; m < modes; ++m)
      average_modes<1>(u + c, y + c, b.padded, tokens, coefficients + m * b.padded + c, plane,
                       h + 2 * m * b.padded + c);
  }
}

// Statistics of a block's groups for one sequence.
struct Running {
  double* mean;
  double* var;
  std::int64_t count;
};

// Normalises a tile in place, in passes so that only the recurrence itself waits for the token
// before. means and scales [tokens, all groups] may be null.
inline void normalise(float* x, const Block& b, std::int64_t tokens, std::int64_t all_groups,
                      double eps, const float* gain, const float* bias, Running& running,
                      double* means, double* scales) {
  const Tag d;
  double shares[kTile], mean[kTile], var[kTile];
  for (std::int64_t t = 0; t < tokens; ++t)
    shares[t] = 1 / static_cast<double>(running.count + t + 1);
  for (std::int64_t g = 0; g < b.groups; ++g) {
    float* const first = x + g * b.group_width;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Moments token = moments(first + t * b.padded, b.group_width);
      mean[t] = token.mean;
      var[t] = token.var;
    }
    double m = running.mean[b.group + g], v = running.var[b.group + g];
    for (std::int64_t t = 0; t < tokens; ++t) {
      const double step = mean[t] - m, share = shares[t];
      const double gap = var[t] + (1 - share) * step * step;
      mean[t] = m += step * share;
      var[t] = v += (gap - v) * share;
    }
    running.mean[b.group + g] = m;
    running.var[b.group + g] = v;
    inverse_roots(var, tokens, eps);
    for (std::int64_t t = 0; t < tokens; ++t) {
      float* row = first + t * b.padded;
      standardise(row, b.group_width, mean[t], var[t], row);
      if (means == nullptr) continue;
      means[t * all_groups + b.group + g] = mean[t];
      scales[t * all_groups + b.group + g] = var[t];
    }
  }
  running.count += tokens;
  for (std::int64_t c = 0; c < b.padded; c += kWidth) {
    const Vec factor = hn::Load(d, gain + c), shift = hn::Load(d, bias + c);
    for (std::int64_t t = 0; t < tokens; ++t) {
      float* at = x + t * b.padded + c;
      hn::Store(hn::MulAdd(hn::Load(d, at), factor, shift), d, at);
    }
  }
}

template <class T>
void forward_typed(const NormEmaCall& call, const NormEmaResult& result, const Block& b,
                   float* scratch) {
  const std::int64_t P = b.padded, M = call.modes, G = call.groups;
  float *u = scratch, *y = u + kTile * P, *gain = y + kTile * P, *bias = gain + P;
  float *omega = bias + P, *coefficients = omega + P, *h = coefficients + kPlanes * M * P;
  if (G > 0) {
    read_row(call.gain + b.channel, b.width, P, gain);
    read_row(call.bias + b.channel, b.width, P, bias);
  }
  if (M > 0) {
    read_row(call.omega + b.channel, b.width, P, omega);
    read_planes(call.coefficients, kPlanes * M, call.width(), b, coefficients);
  }
  std::int64_t segment = 0;
  for (std::int64_t n = 0; n < call.sequences(); ++n) {
    Running running{nullptr, nullptr, 0};
    if (G > 0) {
      running = {result.mean + n * G, result.var + n * G, call.counts[n]};
      for (std::int64_t g = b.group; g < b.group + b.groups; ++g) {
        running.mean[g] = call.mean[n * G + g];
        running.var[g] = call.var[n * G + g];
      }
    }
    if (M > 0) read_state(call.h == nullptr ? nullptr : call.h + n * call.width() * 2 * M, M, b, h);
    const std::int64_t length = call.length(n), first = call.first(n);
    const auto at = [&](const auto& view, std::int64_t t) {
      const std::int64_t row = call.offsets.empty() ? n : 0,
                         token = call.offsets.empty() ? t : first + t;
      return row * view.strides[1] + token * view.strides[2] + b.channel;
    };
    for (std::int64_t t = 0; t < length; t += kTile) {
      const std::int64_t tokens = std::min(kTile, length - t);
      read_rows(static_cast<const T*>(call.x.data) + at(call.x, t), call.x.strides[2], tokens,
                b.width, P, u);
      if (G > 0) {
        const bool kept = result.means != nullptr;
        normalise(u, b, tokens, G, call.eps, gain, bias, running,
                  kept ? result.means + (first + t) * G : nullptr,
                  kept ? result.scales + (first + t) * G : nullptr);
        if (result.u)
          write_rows(u, P, tokens, b.width, result.u.strides[2],
                     static_cast<T*>(result.u.data) + at(result.u, t));
      }
      if (M == 0) continue;
      if (result.checkpoints != nullptr && t % kSegment == 0) {
        float* to = result.checkpoints + segment++ * 2 * M * call.width() + b.channel;
        write_rows(h, P, 2 * M, b.width, call.width(), to);
      }
      average(u, y, b, tokens, M, coefficients, omega, h);
      write_rows(y, P, tokens, b.width, result.e.strides[2],
                 static_cast<T*>(result.e.data) + at(result.e, t));
    }
    if (M > 0) write_state(h, M, b, result.h + n * call.width() * 2 * M);
  }
}

void forward_any(const NormEmaCall& call, const NormEmaResult& result, const Block& block,
                 float* scratch) {
  if (call.x.dtype == DType::kFloat32)
    forward_typed<float>(call, result, block, scratch);
  else
    forward_typed<BFloat16>(call, result, block, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::megalodon::cpu
HWY_AFTER_NAMESPACE();
#endif
