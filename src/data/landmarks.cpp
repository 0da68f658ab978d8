#include "data/landmarks.h"

#include "data/targets.h"

namespace everlong {

LabelledText with_landmarks(const LabelledText& text, std::int64_t block, std::int32_t landmark) {
  LabelledText out;
  LandmarkInserter inserter(block, landmark);
  for (std::size_t i = 0; i < text.ids.size(); ++i) {
    inserter.insert(std::span(text.ids).subspan(i, 1), out.ids);
    out.targets.resize(out.ids.size() - 1, kNoTarget);
    out.weights.resize(out.ids.size() - 1, 0);
    out.targets.push_back(text.targets[i]);
    out.weights.push_back(text.weights[i]);
    if (text.writes.empty()) continue;
    out.writes.resize(out.ids.size() - 1, 1);
    out.writes.push_back(text.writes[i]);
  }
  return out;
}

}  // namespace everlong
