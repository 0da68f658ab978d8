#include "eval/proportion.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/text.h"

namespace everlong {
namespace {

constexpr double kZ = 1.959963984540054;  // the normal distribution has 2.5 % beyond it

struct Interval {
  double centre = 0.5, half = 0.5;
};

// centre and half width of the roots p of (p' - p)^2 = z^2 p (1 - p) / n.
Interval wilson(const Proportion& p) {
  if (p.trials == 0) return {};
  const double n = static_cast<double>(p.trials), share = p.share(), z2 = kZ * kZ;
  const double scale = 1 / (1 + z2 / n);
  return {scale * (share + z2 / (2 * n)),
          scale * kZ * std::sqrt(share * (1 - share) / n + z2 / (4 * n * n))};
}

}  // namespace

double Proportion::share() const {
  return trials == 0 ? 0 : static_cast<double>(successes) / static_cast<double>(trials);
}

double Proportion::low() const {
  const auto [centre, half] = wilson(*this);
  return successes == 0 ? 0 : std::max(0.0, centre - half);
}

double Proportion::high() const {
  const auto [centre, half] = wilson(*this);
  return successes == trials ? 1 : std::min(1.0, centre + half);
}

std::string percent(double share) {
  if (share == 0 || share == 1) return share == 0 ? "0" : "100";
  return fixed(std::clamp(100 * share, 0.1, 99.9), 1);
}

nlohmann::ordered_json to_json(const Proportion& proportion) {
  return {{"successes", proportion.successes},
          {"trials", proportion.trials},
          {"share", proportion.share()},
          {"low", proportion.low()},
          {"high", proportion.high()}};
}

}  // namespace everlong
