#include "eval/timing.h"

#include <algorithm>

namespace everlong {

Spread spread(std::vector<double> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
  return {median, values.front(), values.back(), std::ssize(values)};
}

std::vector<Spread> measure_in_turns(const std::vector<std::function<void()>>& works,
                                     const Repeats& repeats) {
  for (const auto& work : works) work();
  std::vector<std::vector<double>> seconds(works.size());
  std::vector<double> sums(works.size(), 0);
  const auto satisfied = [&](std::size_t i) {
    const std::int64_t done = std::ssize(seconds[i]);
    return (done >= repeats.min_repeats && sums[i] >= repeats.min_seconds) ||
           (done >= 3 && sums[i] >= repeats.enough_seconds);
  };
  for (bool more = true; more;) {
    more = false;
    for (std::size_t i = 0; i < works.size(); ++i) {
      if (satisfied(i)) continue;
      const Stopwatch watch;
      works[i]();
      seconds[i].push_back(watch.seconds());
      sums[i] += seconds[i].back();
      more = true;
    }
  }
  std::vector<Spread> out;
  for (auto& values : seconds) out.push_back(spread(std::move(values)));
  return out;
}

}  // namespace everlong
