// Random numbers that are the same on every machine and with every library.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace everlong {

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Random {
  std::uint64_t state = 0;

  std::uint64_t operator()() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // Uniform in [0, limit), limit >= 1; the bias of the remainder is below limit / 2^64.
  std::int64_t below(std::int64_t limit) {
    return static_cast<std::int64_t>((*this)() % static_cast<std::uint64_t>(limit));
  }
  // Uniform in [low, high], both included.
  std::int64_t between(std::int64_t low, std::int64_t high) { return low + below(high - low + 1); }
  // Uniform in [0, 1).
  double share() { return static_cast<double>((*this)() >> 11) * 0x1p-53; }
};

// One seed out of several numbers: the order counts, and near numbers give unrelated seeds.
inline std::uint64_t mixed_seed(std::initializer_list<std::uint64_t> numbers) {
  std::uint64_t seed = 0;
  for (const std::uint64_t number : numbers) seed = Random{seed ^ Random{number}()}();
  return seed;
}

}  // namespace everlong
