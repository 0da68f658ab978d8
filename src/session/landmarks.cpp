#include "session/landmarks.h"

#include <algorithm>

namespace everlong {
namespace {

constexpr const char* kRoom = "landmark";
constexpr std::int64_t kDefaultBlock = 64;  // of the room, where its settings leave it open

}  // namespace

std::optional<LandmarkRule> LandmarkRule::of(const ModelConfig& config) {
  if (config.landmark_id < 0 ||
      std::ranges::find(config.layer_types, kRoom) == config.layer_types.end())
    return std::nullopt;
  const auto room = config.mechanisms.find(kRoom);
  const std::int64_t block =
      room == config.mechanisms.end() ? kDefaultBlock : room->second.value("block", kDefaultBlock);
  return LandmarkRule(block, static_cast<std::int32_t>(config.landmark_id),
                      config.landmark_predicted);
}

LandmarkRule::Marked LandmarkRule::mark(std::span<const std::int32_t> text,
                                        std::int64_t position) const {
  Marked marked;
  const auto add = [&](std::int32_t id, std::int64_t from) {
    marked.ids.push_back(id);
    marked.from.push_back(from);
    ++position;
  };
  const auto due = [&] { return position % block_ == block_ - 1; };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == id_) continue;
    if (due()) add(id_, -1);
    add(text[i], static_cast<std::int64_t>(i));
    if (predicted_ && due()) add(id_, -1);
  }
  return marked;
}

}  // namespace everlong
