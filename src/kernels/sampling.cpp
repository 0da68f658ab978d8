#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace everlong {
namespace {

constexpr std::int64_t kMaxPenaltyWindow = std::int64_t{1}
                                           << 24;  // 64 MiB of ids; a window is a memory, not a log

// Uniform in [0, 1) from the top 53 bits: the same on every standard library.
double uniform(std::mt19937_64& generator) {
  return static_cast<double>(generator() >> 11) * 0x1.0p-53;
}

}  // namespace

Status validate(const SamplingParams& params) {
  const auto within = [](double value, double min, double max) {
    return value >= min && value <= max;
  };
  if (!within(params.temperature, 0, 1e6))
    return invalid_argument("temperature = ", params.temperature,
                            " is not allowed; a number from 0 (greedy) to 1e6");
  if (params.top_k < 0)
    return invalid_argument("top_k = ", params.top_k, " is negative; 0 keeps all tokens");
  if (!(params.top_p > 0 && params.top_p <= 1))
    return invalid_argument("top_p = ", params.top_p,
                            " is not allowed; a number above 0, up to 1 (keeps all tokens)");
  if (!within(params.min_p, 0, 1))
    return invalid_argument("min_p = ", params.min_p,
                            " is not allowed; a number from 0 (keeps all tokens) to 1");
  if (!within(params.repetition_penalty, 1e-3, 1e3))
    return invalid_argument("repetition_penalty = ", params.repetition_penalty,
                            " is not allowed; a number from 0.001 to 1000, 1 for none");
  if (params.penalty_window < 0 || params.penalty_window > kMaxPenaltyWindow)
    return invalid_argument("penalty_window = ", params.penalty_window, " is not allowed; 0 to ",
                            kMaxPenaltyWindow);
  return {};
}

Sampler::Sampler(const SamplingParams& params)
    : params_(params), valid_(validate(params)), generator_(params.seed) {}

void Sampler::saw(std::int32_t token) {
  const auto window = static_cast<std::size_t>(std::max<std::int64_t>(params_.penalty_window, 0));
  if (params_.repetition_penalty == 1.0 || window == 0) return;
  if (recent_.size() < window) {
    recent_.push_back(token);
    return;
  }
  recent_[next_] = token;
  next_ = (next_ + 1) % window;
}

Status Sampler::collect(std::span<const float> logits) {
  candidates_.resize(logits.size());
  float largest = -INFINITY;
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const float logit = logits[id];
    if (std::isnan(logit) || logit == INFINITY)
      return invalid_argument("logits[", id, "] = ", logit,
                              "; a finite number or -inf is needed. The model's weights ",
                              "or its state hold values that are not numbers.");
    candidates_[id] = {logit, static_cast<std::int32_t>(id), 0};
    largest = std::max(largest, logit);
  }
  if (largest == -INFINITY)
    return invalid_argument("none of the ", logits.size(),
                            " logits is finite: there is no token to draw");
  return {};
}

// CTRL's rule, once per id however often it was seen: from the original logit, so repeats change
// nothing.
void Sampler::penalise(std::span<const float> logits) {
  const double penalty = params_.repetition_penalty;
  for (const std::int32_t id : recent_) {
    if (id < 0 || static_cast<std::size_t>(id) >= logits.size()) continue;
    const double logit = logits[id];
    candidates_[id].logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

std::int32_t Sampler::pick() {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  if (params_.temperature == 0) return std::ranges::min_element(candidates_, better)->id;

  const auto top_k = static_cast<std::size_t>(params_.top_k);
  if (top_k > 0 && top_k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + params_.top_k, candidates_.end(),
                     better);
    candidates_.resize(top_k);
    // How nth_element leaves its halves differs between libraries; sums must not.
    std::ranges::sort(candidates_, better);
  }
  const double largest = std::ranges::min_element(candidates_, better)->logit;
  double total = 0;
  for (Candidate& candidate : candidates_) {
    candidate.weight = std::exp((candidate.logit - largest) / params_.temperature);
    total += candidate.weight;
  }
  if (params_.top_p < 1) {
    // All tokens below this weight together stay short of 1 - top_p: they need no sorting.
    const double least = (1 - params_.top_p) * total / static_cast<double>(candidates_.size());
    std::erase_if(candidates_,
                  [&](const Candidate& candidate) { return candidate.weight < least; });
    std::ranges::sort(candidates_, better);
    double sum = 0;
    std::size_t kept = 0;
    while (kept < candidates_.size() && sum < params_.top_p * total)
      sum += candidates_[kept++].weight;
    candidates_.resize(kept);
    total = sum;
  }
  if (params_.min_p > 0) {
    // The largest weight is 1 by construction.
    std::erase_if(candidates_,
                  [&](const Candidate& candidate) { return candidate.weight < params_.min_p; });
    total = 0;
    for (const Candidate& candidate : candidates_) total += candidate.weight;
  }
  double left = uniform(generator_) * total;
  std::int32_t last = candidates_.front().id;
  for (const Candidate& candidate : candidates_) {
    if (candidate.weight == 0) continue;
    last = candidate.id;
    left -= candidate.weight;
    if (left < 0) break;
  }
  return last;  // rounding may leave a sliver after the last token: it is that token's
}

Result<std::int32_t> Sampler::draw(std::span<const float> logits) {
  EVERLONG_RETURN_IF_ERROR(valid_);
  EVERLONG_RETURN_IF_ERROR(collect(logits));
  if (params_.repetition_penalty != 1.0) penalise(logits);
  const std::int32_t token = pick();
  saw(token);
  return token;
}

std::string Sampler::save() const {
  std::ostringstream out;
  out << recent_.size();
  // Oldest first, so that the place in the ring need not be known.
  for (std::size_t i = 0; i < recent_.size(); ++i)
    out << ' ' << recent_[(next_ + i) % recent_.size()];
  out << ' ' << generator_;
  return out.str();
}

Status Sampler::restore(const std::string& text) {
  std::istringstream in(text);
  std::size_t count = 0;
  std::vector<std::int32_t> ids;
  if (in >> count && count <= static_cast<std::size_t>(kMaxPenaltyWindow)) {
    for (std::int32_t id = 0; ids.size() < count && in >> id;) ids.push_back(id);
  }
  std::mt19937_64 generator;
  if (!in || ids.size() != count || !(in >> generator) || !(in >> std::ws).eof())
    return corrupt("the saved sampler is not readable; give a seed to begin a new random sequence");
  generator_ = generator;
  recent_.clear();
  next_ = 0;
  for (const std::int32_t id : ids) saw(id);
  return {};
}

}  // namespace everlong
