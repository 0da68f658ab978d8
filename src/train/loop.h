// A whole training run: steps, evaluations, saves, the log and the progress bar.
#pragma once
#include <functional>
#include <optional>

#include "train/trainer.h"

namespace everlong {

struct TrainHooks {
  std::function<bool()> interrupted;  // asked after every step; true: save and stop
  std::function<void(const StepReport&)> after_step;
  std::function<void(const std::string&)> note = {};  // what a person should know
};

enum class RunStart {
  kNew,      // refused where the folder holds a run that stopped before its end
  kResume,   // from the newest checkpoint that can be read; from the first step where there is none
  kRestart,  // from the first step, whatever the folder holds
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

// Writes the run folder (docs/formats.md): run.toml (the effective run file), log.jsonl, events for
// TensorBoard, checkpoints, the model, the best model. One training a folder at a time.
//
// A run that goes on gives the same losses, bit for bit on the CPU with as many threads, as one
// that never stopped. Fails with kInterrupted, checkpoint and model saved, when hooks.interrupted
// says so; on any other failure, a full disk included, the checkpoints are those of the last save.
Result<TrainReport> train(const RunFile& run, const TrainHooks& hooks = {},
                          RunStart start = RunStart::kNew);

}  // namespace everlong
