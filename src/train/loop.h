// A whole training run: steps, evaluations, saves, the log and the progress bar.
#pragma once
#include <functional>
#include <optional>

#include "train/trainer.h"

namespace everlong {

struct TrainHooks {
  std::function<bool()> interrupted;  // asked after every step; true: save and stop
  std::function<void(const StepReport&)> after_step;
};

struct TrainReport {
  fs::path model_folder;
  std::int64_t parameters = 0, steps = 0, tokens = 0;
  double seconds = 0;  // of the steps and the evaluations between them
  double tokens_per_second = 0;
  double epochs = 0;                // times that the training split was read
  double loss = 0;                  // mean of the last steps (at most 20)
  std::optional<Evaluation> valid;  // after the last step
};

// Writes OUT/run.toml (the effective run file), OUT/log.jsonl (docs/formats.md) and OUT/model.
// Fails with kInterrupted, the model saved, when hooks.interrupted says so; on any other failure
// OUT/model is what the last save left.
Result<TrainReport> train(const RunFile& run, const TrainHooks& hooks = {});

}  // namespace everlong
