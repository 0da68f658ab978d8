#include "mechanisms/landmark/kernel_certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace everlong::landmark {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1 + 1e-9;  // above the rounding of the sums below, for 10^6 blocks

// Orders NaN: it comes first, and what holds it is read.
double ordered(double x) { return std::isnan(x) ? kInfinity : x; }

}  // namespace

UnreadBlocks::UnreadBlocks() : top_(-kInfinity) {}

void UnreadBlocks::add(double score, double value_norm) {
  if (score == -kInfinity) return;
  if (score > top_) {
    const double shrink = std::exp(top_ - score);  // 0 at first
    sum_ *= shrink;
    weighed_ *= shrink;
    top_ = score;
  }
  const double weight = std::exp(score - top_);
  sum_ += weight;
  weighed_ += weight * value_norm;
}

Certificate UnreadBlocks::certify(double read_lse, double out_norm, Unread unread) const {
  if (sum_ == 0) return {0, 0, read_lse};
  const double top = std::max(top_, read_lse);
  const double lse = top + std::log(std::exp(top_ - top) * sum_ + std::exp(read_lse - top));
  const double factor = std::exp(top_ - lse);
  Certificate made{factor * weighed_, factor * sum_, lse};
  if (unread == Unread::kLeftOut) made.bound += made.unread_share * out_norm;
  made.bound *= kRounding;
  if (!(made.bound < kInfinity)) made.bound = kInfinity;
  return made;
}

BlockChoice choose_blocks(std::span<const float> scores, std::span<const float> value_norms,
                          double local_lse, double local_norm, const ChoiceLimits& limits,
                          Unread unread) {
  const std::size_t count = scores.size();
  UnreadBlocks all;
  double out_norm = local_norm;
  for (std::size_t b = 0; b < count; ++b) {
    all.add(scores[b], value_norms[b]);
    out_norm = std::max(out_norm, double{value_norms[b]});
  }
  const double lse = all.certify(local_lse, 0, unread).lse;
  if (unread == Unread::kWithTrueSum) out_norm = 0;
  std::vector<double> share(count);  // of the bound
  for (std::size_t b = 0; b < count; ++b)
    share[b] = ordered(std::exp(scores[b] - lse) * (value_norms[b] + out_norm));

  std::vector<std::int64_t> order(count);
  std::iota(order.rbegin(), order.rend(), 0);  // young to old: stable sorts keep the younger first
  const auto within = [](std::int64_t x, std::size_t most) {
    return x <= 0 ? 0 : std::min(static_cast<std::size_t>(x), most);
  };
  const std::size_t most = within(limits.at_most, count), least = within(limits.at_least, most);
  const auto by = [](const auto& key) {
    return [&key](std::int64_t a, std::int64_t b) {
      return ordered(key[static_cast<std::size_t>(a)]) > ordered(key[static_cast<std::size_t>(b)]);
    };
  };
  std::ranges::stable_sort(order, by(scores));
  std::stable_sort(order.begin() + static_cast<std::ptrdiff_t>(least), order.end(), by(share));

  // rest[i]: the bound when order[0, i) are read; summed from the small ends.
  std::vector<double> rest(count + 1, 0);
  for (std::size_t i = count; i-- > 0;)
    rest[i] = rest[i + 1] + share[static_cast<std::size_t>(order[i])];
  std::size_t read = least;
  while (read < most && !(rest[read] * kRounding <= limits.epsilon)) ++read;

  BlockChoice choice;
  choice.bound = rest[read] < kInfinity ? rest[read] * kRounding : kInfinity;
  choice.certified = choice.bound <= limits.epsilon;
  choice.blocks.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(read));
  std::ranges::sort(choice.blocks);
  return choice;
}

}  // namespace everlong::landmark
