// What the training loop itself carries from step to step, beside the trainer.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "train/trainer.h"

namespace everlong {

struct LoopState {
  double seconds = 0;  // trained so far
  struct Interval {    // sums over the steps since the log's newest line
    std::int64_t steps = 0, tokens = 0;
    double loss = 0, seconds = 0;
  } interval;
  std::vector<double> recent;       // losses of the last steps, oldest first
  std::optional<Evaluation> valid;  // the last one
  std::optional<double> best;       // lowest loss of all evaluations
  std::int64_t gates_logged = 0;
  std::int64_t lines = 0;       // of the log, `line` included
  nlohmann::ordered_json line;  // its newest; null: none
};

nlohmann::ordered_json to_json(const LoopState& state);  // doubles come back bit for bit
// From the metadata "loop" of a checkpoint.
Result<LoopState> loop_state_from(const TensorFile& checkpoint);

}  // namespace everlong
