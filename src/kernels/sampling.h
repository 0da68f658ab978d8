// Drawing one token from logits.
#pragma once
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"

namespace everlong {

struct SamplingParams {
  double temperature = 1.0;  // 0: the largest logit, lowest id on a tie
  std::int64_t top_k = 0;    // 0: all; of equal logits at the edge the lowest ids stay
  double top_p = 1.0;  // smallest set whose probabilities sum to >= top_p (nucleus, 1904.09751)
  double min_p = 0.0;  // drop tokens below min_p times the largest probability (2407.01082)
  double repetition_penalty =
      1.0;  // > 1 discourages ids of the last `penalty_window` tokens (CTRL, 1909.05858)
  std::int64_t penalty_window = 64;
  std::uint64_t seed = 0;
};
// Refuses what no draw can follow; the message names the parameter and what is allowed.
Status validate(const SamplingParams& params);

// Penalty, temperature, top-k, top-p, min-p in this order, then one draw. Same seed, same logits:
// same tokens on every machine (own uniform draw from mt19937_64; std distributions differ between
// libraries). Not thread safe.
class Sampler {
 public:
  explicit Sampler(const SamplingParams& params);
  // The id drawn, which the penalty then knows. Refuses invalid parameters, NaN and +inf; -inf is a
  // token that is never drawn.
  Result<std::int32_t> draw(std::span<const float> logits);
  void saw(
      std::int32_t token);  // tells the penalty of a token that was not drawn here (the prompt)

  // Where the random sequence and the penalty's memory stand, as text for a file; restore() goes on
  // from there, with this sampler's own parameters, and changes nothing when it refuses the text.
  std::string save() const;
  Status restore(const std::string& text);

 private:
  // A token that is still in the race; weight is a probability up to a common factor.
  struct Candidate {
    double logit = 0;
    std::int32_t id = 0;
    double weight = 0;
  };
  Status collect(std::span<const float> logits);
  void penalise(std::span<const float> logits);
  std::int32_t pick();

  SamplingParams params_;
  Status valid_;
  std::mt19937_64 generator_;
  std::vector<std::int32_t> recent_;  // ring of the last penalty_window ids
  std::size_t next_ = 0;
  std::vector<Candidate> candidates_;
};

}  // namespace everlong
