// Published models by name: their shapes, not their weights.
#pragma once
#include <span>
#include <string_view>

#include "models/config.h"

namespace everlong {

struct Preset {
  std::string_view name;    // "minimax-text-01"
  std::string_view source;  // where the numbers were published
  std::string_view json;    // the published config.json, without keys that change nothing
};

std::span<const Preset> presets();

// The model of that name, or a message that lists the names and guesses.
Result<ModelConfig> preset(std::string_view name);

}  // namespace everlong
