#include "train/loop_state.h"

#include <cmath>

#include "train/checkpoint_file.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

// JSON has no NaN: it is written as null.
double number_or_nan(const ordered_json& value) {
  return value.is_null() ? std::nan("") : value.get<double>();
}

}  // namespace

ordered_json to_json(const LoopState& state) {
  ordered_json object = {{"seconds", state.seconds},
                         {"interval",
                          {{"steps", state.interval.steps},
                           {"tokens", state.interval.tokens},
                           {"loss", state.interval.loss},
                           {"seconds", state.interval.seconds}}},
                         {"recent", state.recent},
                         {"valid", nullptr},
                         {"best", nullptr},
                         {"gates_logged", state.gates_logged},
                         {"lines", state.lines},
                         {"line", state.line}};
  if (state.valid)
    object["valid"] = {{"loss", state.valid->loss},
                       {"bits_per_byte", state.valid->bits_per_byte},
                       {"of_text", state.valid->of_text},
                       {"tokens", state.valid->tokens}};
  if (state.best) object["best"] = *state.best;
  return object;
}

Result<LoopState> loop_state_from(const TensorFile& checkpoint) {
  EVERLONG_ASSIGN(const auto text, metadata_entry(checkpoint, "loop"));
  const auto object = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  try {
    LoopState state;
    state.seconds = object.at("seconds");
    const auto& interval = object.at("interval");
    state.interval = {interval.at("steps"), interval.at("tokens"), interval.at("loss"),
                      interval.at("seconds")};
    state.recent = object.at("recent").get<std::vector<double>>();
    if (const auto& valid = object.at("valid"); !valid.is_null())
      state.valid =
          Evaluation{number_or_nan(valid.at("loss")), number_or_nan(valid.at("bits_per_byte")),
                     valid.at("of_text"), valid.at("tokens")};
    if (const auto& best = object.at("best"); !best.is_null()) state.best = best.get<double>();
    state.gates_logged = object.at("gates_logged");
    state.lines = object.at("lines");
    state.line = object.at("line");
    if (!state.line.is_null() && !state.line.at("step").is_number_integer())
      return corrupt("metadata \"loop\": its line has no step");
    return state;
  } catch (const nlohmann::json::exception& error) {
    return corrupt("metadata \"loop\": ", error.what());
  }
}

}  // namespace everlong
