// Repeated measurements on a machine that others use too.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

namespace everlong {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct Spread {
  double median = 0, min = 0, max = 0;
  std::int64_t repeats = 0;
};
Spread spread(std::vector<double> values);

struct Repeats {
  double min_seconds = 0.5;  // of timed work, each
  std::int64_t min_repeats = 5;
  double enough_seconds = 15;  // after which three repeats will do
};

// Times works against each other: each once to warm up, then all in turn until each has had its
// repeats, so that a disturbance falls on all of them. Works must end with the device idle. Seconds
// a run.
std::vector<Spread> measure_in_turns(const std::vector<std::function<void()>>& works,
                                     const Repeats& repeats = {});

}  // namespace everlong
