// How fast a model trains and streams at each length. Random tokens: speed does not depend on what
// they say.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "cli/shared_options.h"
#include "eval/timing.h"

namespace everlong::cli {

struct ModelBenchOptions {
  std::vector<std::int64_t> lengths = {1024, 4096, 16384};
  std::int64_t rows = 1;     // of a training batch
  std::int64_t feed = 2048;  // tokens fed at a time when reading
  bool checkpointing = false;
  bool no_training = false;
};

struct ModelSpeed {
  std::int64_t tokens = 0;               // of a row
  Spread training, reading, writing;     // tokens a second; none where not measured
  std::int64_t training_peak_bytes = 0;  // device memory, or the process's peak so far on the CPU
  std::int64_t state_bytes = 0;          // after reading
  std::string trouble;                   // why training was not measured
};

Result<ModelSpeed> bench_model(const ModelConfig& config, const Place& place, std::int64_t tokens,
                               const ModelBenchOptions& options);
nlohmann::ordered_json to_json(const ModelSpeed& speed);

// The configuration of a model folder, a run folder, a config.json or a run file.
Result<ModelConfig> read_any_config(const fs::path& source);

}  // namespace everlong::cli
