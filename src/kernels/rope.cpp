#include "kernels/rope.h"

#include <array>
#include <cmath>

namespace everlong {
namespace {

constexpr std::int64_t kBlock =
    64;  // sqrt of a few thousand positions: fewest calls of sin and cos for such a run

// p = kBlock * high + low; the angle of p is the sum of the two, and the sum formulas cost four
// products where sin and cos cost thirty times as much.
template <class T>
void angles(std::span<const std::int64_t> positions, std::span<const double> frequencies, T* cos,
            T* sin) {
  const std::size_t pairs = frequencies.size();
  std::vector<double> low_cos(kBlock * pairs), low_sin(kBlock * pairs), high_cos(pairs),
      high_sin(pairs);
  std::array<bool, kBlock> known{};
  std::int64_t block = -1;
  const auto turn = [&](std::int64_t position, double* c, double* s) {
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      c[i] = std::cos(angle);
      s[i] = std::sin(angle);
    }
  };
  for (const std::int64_t position : positions) {
    const auto low = static_cast<std::size_t>(position % kBlock);
    double* lc = low_cos.data() + low * pairs;
    double* ls = low_sin.data() + low * pairs;
    if (!known[low]) turn(static_cast<std::int64_t>(low), lc, ls);
    known[low] = true;
    if (position / kBlock != block) {
      block = position / kBlock;
      turn(block * kBlock, high_cos.data(), high_sin.data());
    }
    for (std::size_t i = 0; i < pairs; ++i) {
      *cos++ = static_cast<T>(high_cos[i] * lc[i] - high_sin[i] * ls[i]);
      *sin++ = static_cast<T>(high_sin[i] * lc[i] + high_cos[i] * ls[i]);
    }
  }
}

}  // namespace

std::vector<double> rope_frequencies(double theta, std::int64_t rotary_dim) {
  std::vector<double> out;
  for (std::int64_t i = 0; i < rotary_dim; i += 2)
    out.push_back(std::pow(theta, -static_cast<double>(i) / static_cast<double>(rotary_dim)));
  return out;
}

void rope_angles(std::span<const std::int64_t> positions, std::span<const double> frequencies,
                 float* cos, float* sin) {
  angles(positions, frequencies, cos, sin);
}

void rope_angles(std::span<const std::int64_t> positions, std::span<const double> frequencies,
                 double* cos, double* sin) {
  angles(positions, frequencies, cos, sin);
}

}  // namespace everlong
