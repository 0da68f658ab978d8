#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace everlong {

Schedule::Kind schedule_kind(const std::string& name) {
  if (name == "wsd") return Schedule::Kind::kWsd;
  return name == "constant" ? Schedule::Kind::kConstant : Schedule::Kind::kCosine;
}

double Schedule::fraction(std::int64_t step, double seconds) const {
  const double by_steps = static_cast<double>(step) / static_cast<double>(steps);
  const double by_time = max_seconds > 0 ? seconds / max_seconds : 0;
  return std::clamp(std::max(by_steps, by_time), 0.0, 1.0);
}

double Schedule::rate(std::int64_t step, double seconds) const {
  const double ramp =
      step < warmup_steps ? static_cast<double>(step + 1) / static_cast<double>(warmup_steps) : 1.0;
  const double f = fraction(step, seconds);
  double height = 1;  // of shape, between min_lr_ratio (0) and 1 (1)
  if (kind == Kind::kCosine) {
    const double start =
        std::min(static_cast<double>(warmup_steps) / static_cast<double>(steps), 1.0);
    const double done = start < 1 ? std::clamp((f - start) / (1 - start), 0.0, 1.0) : 1.0;
    height = 0.5 * (1 + std::cos(std::numbers::pi * done));
  } else if (kind == Kind::kWsd && decay_fraction > 0) {
    height = std::clamp((1 - f) / decay_fraction, 0.0, 1.0);
  }
  return learning_rate * std::min(ramp, min_lr_ratio + (1 - min_lr_ratio) * height);
}

}  // namespace everlong
