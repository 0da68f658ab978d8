// A trained model of softmax layers as one of Infini-attention layers (2404.07143, section 3.2):
// the same projections, a gate more, text longer than a segment remembered.
#pragma once
#include <nlohmann/json.hpp>

#include "models/config.h"

namespace everlong {

// The config with its softmax layers replaced; `settings` are the room's own (segment, update,
// gate_init, ...). Heads and rotation come from the softmax layers. Refuses a model without softmax
// layers, and windows and partial rotation, which Infini-attention does not have. With empty =
// "bypass" (the default) texts of up to one segment give the same numbers as before, bit for bit.
Result<ModelConfig> with_infini_layers(const ModelConfig& config, const nlohmann::json& settings);

// Where the gates of a converted model start unless settings say otherwise: a twentieth of the
// output is memory, and the slope of the sigmoid is large enough to train (0 is for models trained
// from the start).
inline constexpr double kConvertedGateInit = -3;

}  // namespace everlong
