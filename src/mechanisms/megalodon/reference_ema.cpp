#include <cmath>
#include <complex>
#include <numbers>

#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon::reference {
namespace {

using Complex = std::complex<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One mode n (from 1) of one channel.
struct Mode {
  double a, damping, phase_share;  // sig(alpha), sig(delta), sig(theta)
  Complex turn, q, c;              // e^(i phi), the eigenvalue, gamma / sqrt(M)
};

Mode mode_of(const Ema& p, std::int64_t channel, std::int64_t index) {
  const std::int64_t at = channel * p.modes + index;
  const auto count = static_cast<double>(p.modes);
  Mode m{};
  m.a = sigmoid(p.alpha[at]);
  m.damping = sigmoid(p.delta[at]);
  m.phase_share = sigmoid(p.theta[channel]);
  const double phi = static_cast<double>(index + 1) * m.phase_share * 2 * std::numbers::pi / count;
  m.turn = std::polar(1.0, phi);
  m.q = (1 - m.a * m.damping) * m.turn;
  m.c = Complex(p.gamma[2 * at], p.gamma[2 * at + 1]) / std::sqrt(count);
  return m;
}

Complex start_of(const Ema& p, std::int64_t channel, std::int64_t index) {
  const std::int64_t at = 2 * (channel * p.modes + index);
  return p.h.empty() ? Complex() : Complex(p.h[at], p.h[at + 1]);
}

EmaResult with_omega(const Ema& p) {
  EmaResult out{Doubles(p.x.size()), Doubles(static_cast<std::size_t>(p.width * p.modes * 2))};
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t j = 0; j < p.width; ++j)
      out.y[t * p.width + j] = p.omega[j] * p.x[t * p.width + j];
  return out;
}

void store(EmaResult& out, const Ema& p, std::int64_t channel, std::int64_t index, Complex h) {
  const std::int64_t at = 2 * (channel * p.modes + index);
  out.h[at] = h.real();
  out.h[at + 1] = h.imag();
}

// In place, size a power of two; the inverse is not divided by the size.
void transform(std::vector<Complex>& x, bool inverse) {
  const std::size_t n = x.size();
  for (std::size_t i = 1, j = 0; i < n; ++i) {
    std::size_t bit = n >> 1;
    for (; (j & bit) != 0; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) std::swap(x[i], x[j]);
  }
  for (std::size_t size = 2; size <= n; size *= 2)
    for (std::size_t k = 0; k < size / 2; ++k) {
      const Complex w = std::polar(1.0, (inverse ? 2 : -2) * std::numbers::pi *
                                            static_cast<double>(k) / static_cast<double>(size));
      for (std::size_t begin = 0; begin < n; begin += size) {
        const Complex even = x[begin + k], odd = w * x[begin + k + size / 2];
        x[begin + k] = even + odd;
        x[begin + k + size / 2] = even - odd;
      }
    }
}

}  // namespace

EmaResult ema(const Ema& p) {
  EmaResult out = with_omega(p);
  for (std::int64_t j = 0; j < p.width; ++j)
    for (std::int64_t n = 0; n < p.modes; ++n) {
      const Mode m = mode_of(p, j, n);
      Complex h = start_of(p, j, n);
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        h = m.q * h + m.a * p.x[t * p.width + j];
        out.y[t * p.width + j] += (m.c * h).real();
      }
      store(out, p, j, n, h);
    }
  return out;
}

// Within a block y_i = sum_{k<=i} K_{i-k} x_k + Re(c q^{i+1} h) with K_j = Re(c a q^j), and the
// state moves by q^m h + sum_k q^{m-1-k} a x_k: a last block of m tokens decays by q^m.
EmaResult ema_chunked(const Ema& p, std::int64_t block) {
  EmaResult out = with_omega(p);
  for (std::int64_t j = 0; j < p.width; ++j)
    for (std::int64_t n = 0; n < p.modes; ++n) {
      const Mode m = mode_of(p, j, n);
      std::vector<Complex> power = {1};
      while (static_cast<std::int64_t>(power.size()) <= block) power.push_back(power.back() * m.q);
      Complex h = start_of(p, j, n);
      for (std::int64_t begin = 0; begin < p.tokens; begin += block) {
        const std::int64_t length = std::min(block, p.tokens - begin);
        Complex next = power[length] * h;
        for (std::int64_t i = 0; i < length; ++i) {
          double& y = out.y[(begin + i) * p.width + j];
          y += (m.c * power[i + 1] * h).real();
          for (std::int64_t k = 0; k <= i; ++k)
            y += (m.c * m.a * power[i - k]).real() * p.x[(begin + k) * p.width + j];
          next += power[length - 1 - i] * m.a * p.x[(begin + i) * p.width + j];
        }
        h = next;
      }
      store(out, p, j, n, h);
    }
  return out;
}

EmaResult ema_fft(const Ema& p) {
  EmaResult out = with_omega(p);
  std::size_t size = 2;
  while (static_cast<std::int64_t>(size) < 2 * p.tokens) size *= 2;
  for (std::int64_t j = 0; j < p.width; ++j) {
    std::vector<Complex> kernel(size), x(size);
    for (std::int64_t t = 0; t < p.tokens; ++t) x[t] = p.x[t * p.width + j];
    for (std::int64_t n = 0; n < p.modes; ++n) {
      const Mode m = mode_of(p, j, n);
      Complex h = start_of(p, j, n), power = 1;
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        kernel[t] += (m.c * m.a * power).real();
        power *= m.q;
        out.y[t * p.width + j] += (m.c * power * h).real();
      }
      Complex last = power * h;
      power = 1;
      for (std::int64_t t = p.tokens; t-- > 0; power *= m.q) last += power * m.a * x[t].real();
      store(out, p, j, n, last);
    }
    transform(kernel, false);
    transform(x, false);
    for (std::size_t i = 0; i < size; ++i) x[i] *= kernel[i];
    transform(x, true);
    for (std::int64_t t = 0; t < p.tokens; ++t)
      out.y[t * p.width + j] += x[t].real() / static_cast<double>(size);
  }
  return out;
}

// s_t = conj(c) dy_t + conj(q) s_{t+1} runs backwards; then the chain to the stored parameters.
EmaGradients ema_gradients(const Ema& p, Values grad_y, Values grad_h) {
  EmaGradients d;
  d.x.resize(p.x.size());
  for (auto* grad : {&d.alpha, &d.delta}) grad->resize(p.alpha.size());
  for (auto* grad : {&d.gamma, &d.h}) grad->resize(2 * p.alpha.size());
  for (auto* grad : {&d.theta, &d.omega}) grad->resize(static_cast<std::size_t>(p.width));
  const auto count = static_cast<double>(p.modes);
  std::vector<Complex> h(static_cast<std::size_t>(p.tokens) + 1);
  for (std::int64_t j = 0; j < p.width; ++j) {
    const auto dy = [&](std::int64_t t) { return grad_y.empty() ? 0 : grad_y[t * p.width + j]; };
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      d.x[t * p.width + j] += p.omega[j] * dy(t);
      d.omega[j] += dy(t) * p.x[t * p.width + j];
    }
    for (std::int64_t n = 0; n < p.modes; ++n) {
      const std::int64_t at = j * p.modes + n;
      const Mode m = mode_of(p, j, n);
      h[0] = start_of(p, j, n);
      for (std::int64_t t = 0; t < p.tokens; ++t)
        h[t + 1] = m.q * h[t] + m.a * p.x[t * p.width + j];
      Complex s = grad_h.empty() ? Complex() : Complex(grad_h[2 * at], grad_h[2 * at + 1]);
      Complex dq, dc;
      double da = 0;
      for (std::int64_t t = p.tokens; t-- > 0;) {  // on entry s is the gradient of h_t from later
        s += std::conj(m.c) * dy(t);
        d.x[t * p.width + j] += m.a * s.real();
        da += p.x[t * p.width + j] * s.real();
        dq += s * std::conj(h[t]);
        dc += dy(t) * std::conj(h[t + 1]);
        s *= std::conj(m.q);
      }
      d.h[2 * at] = s.real();
      d.h[2 * at + 1] = s.imag();
      const double drho = (dq * std::conj(m.turn)).real();
      const double dphi = (dq * std::conj(m.q)).imag();
      d.alpha[at] = m.a * (1 - m.a) * (da - m.damping * drho);
      d.delta[at] = m.damping * (1 - m.damping) * -m.a * drho;
      d.theta[j] += m.phase_share * (1 - m.phase_share) * 2 * std::numbers::pi / count *
                    static_cast<double>(n + 1) * dphi;
      d.gamma[2 * at] = dc.real() / std::sqrt(count);
      d.gamma[2 * at + 1] = dc.imag() / std::sqrt(count);
    }
  }
  return d;
}

}  // namespace everlong::megalodon::reference
