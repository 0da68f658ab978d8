// A share of successes and how sure it is.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace everlong {

// Wilson's score interval at 95 % (E. B. Wilson, JASA 22, 1927): holds its level where few trials
// or none fail, unlike the normal one. Trials count as independent.
struct Proportion {
  std::int64_t successes = 0, trials = 0;

  void add(bool success) {
    successes += success ? 1 : 0;
    ++trials;
  }
  void add(const Proportion& other) {
    successes += other.successes;
    trials += other.trials;
  }
  double share() const;  // 0 without trials
  double low() const;    // 0 and 1 without trials: nothing is known
  double high() const;
};

std::string percent(double share);  // "97.3"; "100" and "0" only where it is exact
// {"successes", "trials", "share", "low", "high"}
nlohmann::ordered_json to_json(const Proportion& proportion);

}  // namespace everlong
