// The gates of a model in training (layers/gated.h), as the training log shows them.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "models/decoder.h"

namespace everlong {

struct GateReport {
  std::array<std::int64_t, 10> histogram{};  // of [0, 0.1), ..., [0.9, 1]
  double smallest = 1, largest = 0;
  double spread() const { return largest - smallest; }
};

// Over all layers with gates; nothing when the model has none.
std::optional<GateReport> gates_of(const Decoder& model);

// Gates that are still within 0.02 of each other after 1,000 steps have not learned: their rate is
// too low (published runs moved 0.03 in all). What to do, or nothing.
std::optional<std::string> gate_alarm(const GateReport& report, std::int64_t step);

}  // namespace everlong
