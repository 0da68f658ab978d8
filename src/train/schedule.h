// The learning rate over a run: warm-up, then cosine, WSD or constant.
#pragma once
#include <cstdint>
#include <string>

namespace everlong {

// lr = learning_rate * min(ramp, shape): ramp rises linearly over the first `warmup_steps` steps
// (1/warmup at step 0), shape falls with the done fraction f of the run to `min_lr_ratio`:
//   cosine    a half cosine from the end of the warm-up (1608.03983 without restarts)
//   wsd       1 until f = 1 - decay_fraction, then linear: warm-up, stable, decay (2404.06395)
//   constant  1
struct Schedule {
  enum class Kind { kCosine, kWsd, kConstant };
  Kind kind = Kind::kCosine;
  double learning_rate = 1e-3;
  std::int64_t steps = 1, warmup_steps = 0;
  double decay_fraction = 0.2, min_lr_ratio = 0.1;
  double max_seconds = 0;  // 0: steps alone decide

  // The part of the run that is done before `step`: of the steps or of the time, whichever is
  // further.
  double fraction(std::int64_t step, double seconds) const;
  // The learning rate of `step` (from 0), which begins `seconds` into the run.
  double rate(std::int64_t step, double seconds) const;
};

// "cosine", "wsd" or "constant", as the run file checked.
Schedule::Kind schedule_kind(const std::string& name);

}  // namespace everlong
