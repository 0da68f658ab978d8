#include "eval/stream_reader.h"

#include <algorithm>
#include <cmath>

namespace everlong {
namespace {

constexpr std::int64_t kLandmarkBlock = 64;  // of the room, where its settings leave it open

std::optional<LandmarkInserter> inserter_for(const ModelConfig& config) {
  if (config.landmark_id < 0) return std::nullopt;
  std::int64_t block = kLandmarkBlock;
  if (const auto room = config.mechanisms.find("landmark"); room != config.mechanisms.end())
    block = room->second.value("block", kLandmarkBlock);
  return LandmarkInserter(block, static_cast<std::int32_t>(config.landmark_id),
                          config.landmark_predicted);
}

}  // namespace

StreamReader::StreamReader(Stream& stream)
    : stream_(stream), landmarks_(inserter_for(stream.model().config())) {}

void StreamReader::reset() {
  stream_.reset();
  if (landmarks_) landmarks_->reset();
}

Status StreamReader::feed(std::span<const std::int32_t> tokens) {
  if (!landmarks_) return stream_.feed(tokens);
  marked_.clear();
  landmarks_->insert(tokens, marked_);
  return stream_.feed(marked_);
}

Result<std::int32_t> StreamReader::predict() {
  const auto logits = stream_.logits();
  if (logits.empty()) return invalid_argument("a fresh stream predicts nothing yet; feed it first");
  if (std::ranges::any_of(logits, [](float logit) { return std::isnan(logit); }))
    return invalid_argument("after ", stream_.position(),
                            " tokens the model predicts what is not a number: its weights or its "
                            "state hold NaN");
  return static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin());
}

}  // namespace everlong
