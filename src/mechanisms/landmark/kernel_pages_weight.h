// What decides which pages stay where reading is fast: the gate mass that readers gave them, the
// newest counting most.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace everlong::landmark {

// Weights fall by half every `half_life` reads. Instead of letting all fall, the newest mass is
// raised: weight = log2 sum_i mass_i 2^(time_i / half_life), whose order is the same at all times.
class GateWeights {
 public:
  explicit GateWeights(std::int64_t half_life) : half_life_(static_cast<double>(half_life)) {}

  // The weight of a page that nothing is known of, read now. NaN counts as little.
  double first(double mass) {
    constexpr double kLeast = 0x1p-40;  // masses below count as this much: a read is a read
    const double now = static_cast<double>(++clock_) / half_life_;
    return std::log2(mass > kLeast ? std::min(mass, 1.0) : kLeast) + now;
  }
  // The weight of a page that had one.
  double again(double weight, double mass) {
    const double added = first(mass);
    const double high = std::max(weight, added), low = std::min(weight, added);
    return high + std::log2(1 + std::exp2(low - high));
  }

 private:
  double half_life_;
  std::int64_t clock_ = 0;
};

}  // namespace everlong::landmark
