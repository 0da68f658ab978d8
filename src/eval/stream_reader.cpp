#include "eval/stream_reader.h"

#include <algorithm>
#include <cmath>

namespace everlong {

Result<std::int32_t> StreamReader::predict() {
  const std::span<const float> logits = stream_.logits();
  if (logits.empty()) return invalid_argument("a fresh stream predicts nothing yet; feed it first");
  if (std::ranges::any_of(logits, [](float logit) { return std::isnan(logit); }))
    return invalid_argument("after ", stream_.position(),
                            " tokens the model predicts what is not a number: its weights or its "
                            "state hold NaN");
  const auto landmark = LandmarkRule::of(stream_.model().config());
  const std::size_t never = landmark ? static_cast<std::size_t>(landmark->id()) : logits.size();
  std::size_t best = never == 0 ? 1 : 0;
  for (std::size_t id = best + 1; id < logits.size(); ++id)
    if (id != never && logits[id] > logits[best]) best = id;
  return static_cast<std::int32_t>(best);
}

}  // namespace everlong
