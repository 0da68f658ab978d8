// Where the landmarks of a model's text lie: a function of the position alone, so that streams
// carry nothing for it.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "models/config.h"

namespace everlong {

// A text as the model reads it. Immutable and thread safe.
class LandmarkRule {
 public:
  // A landmark lies at every position block - 1 mod block (block >= 2, positions count landmarks).
  // Not predicted, it comes right before the token after it, whose prediction is the last text
  // token's; predicted, it follows the last token of its block at once and says what comes next.
  LandmarkRule(std::int64_t block, std::int32_t id, bool predicted)
      : block_(block), id_(id), predicted_(predicted) {}
  // None for a model without landmark_id or without a layer of the landmark mechanism.
  static std::optional<LandmarkRule> of(const ModelConfig& config);

  std::int32_t id() const { return id_; }
  bool predicted() const { return predicted_; }
  std::int64_t text_tokens(std::int64_t position) const { return position - position / block_; }

  struct Marked {
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> from;  // index of each in the text, -1 for a landmark
  };
  // `text` after `position` tokens, with its landmarks. Landmarks that the text brings are left
  // out: they are placed anew.
  Marked mark(std::span<const std::int32_t> text, std::int64_t position) const;

 private:
  std::int64_t block_;
  std::int32_t id_;
  bool predicted_;
};

}  // namespace everlong
