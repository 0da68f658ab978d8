// The run file: everything that a training run depends on, in TOML. docs/formats.md lists the keys.
//
//   [model]  the keys of config.json; settings of a mechanism in [model.<mechanism>]
//   [data]   what is read, and how it is laid out in rows
//   [train]  optimiser, schedule, device, evaluation, saves
//   [out]    where the run folder goes
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/files.h"
#include "core/status.h"
#include "models/config.h"

namespace everlong {

struct DataSettings {
  std::string path;  // a folder of `everlong data prepare`; relative to the current folder
  std::string packing = "packed";  // "packed": rows continue from batch to batch; "shuffled";
                                   // "documents": whole documents in each row
  std::int64_t row_tokens = 256;
  std::int64_t rows = 16;  // rows a batch
};

struct TrainSettings {
  std::string from_model;  // continue the weights of this model folder; then there is no [model]
  std::int64_t steps = 1000;
  double learning_rate = 3e-3;
  double gate_learning_rate = 0;    // of Infini-attention's gates; 0: as learning_rate
  std::string schedule = "cosine";  // "cosine", "wsd", "constant"
  std::int64_t warmup_steps = 20;
  double decay_fraction = 0.2;  // wsd: the last part of the run, over which the rate falls
  double min_lr_ratio = 0.1;    // of learning_rate, at the end
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  double clip = 1.0;              // largest global norm of the gradients; 0: any
  std::int64_t accumulation = 1;  // batches a step
  std::string dtype = "auto";     // "fp32", "bf16"; auto: bf16 on CUDA
  std::string device = "auto";    // "cpu", "cuda"; auto: cuda when there is one
  std::int64_t seed = 1;
  std::int64_t threads = 0;  // 0: torch's choice
  bool checkpointing = false;
  // "none": every row starts fresh. "detached": state goes from row to row and segment to segment,
  // gradients do not. "exact": gradients also pass through the segments of a row, at the memory of
  // one segment.
  std::string carry = "none";
  std::int64_t segment_tokens = 0;  // rows are fed in segments of this many tokens; 0: whole rows
  double max_seconds =
      0;  // the run ends, its schedule finished, after this time; 0: by steps alone
  std::int64_t eval_every = 0;       // steps; 0: after the last step only
  std::int64_t eval_tokens = 65536;  // of the validation split; 0: none
  // The model, and a checkpoint from which the run can go on: after so many steps, and so many
  // seconds after the last one; 0: not for that reason. At the end always.
  std::int64_t save_every = 0;
  double save_seconds = 600;
  std::int64_t keep_checkpoints = 2;  // the newest; 0: none are written
  bool keep_best = true;  // the model with the lowest loss of all evaluations, where eval_every > 0
  std::int64_t log_every = 1;
  bool tensorboard = true;  // events for TensorBoard in the run folder
};

struct OutSettings {
  std::string folder = "runs/train";
};

struct RunFile {
  std::string name;   // the file it came from: opens messages
  ModelConfig model;  // meaningless when train.from_model is given
  DataSettings data;
  TrainSettings train;
  OutSettings out;

  // Overrides are "section.key=value" as `--set` gives them: the value is TOML, or plain text ("1K"
  // counts as 1024 where a whole number is wanted). Unknown keys and wrong types are refused with
  // file and line.
  static Result<RunFile> read(const fs::path& path, const std::vector<std::string>& overrides);
  static Result<RunFile> parse(std::string_view toml, const std::string& name,
                               const std::vector<std::string>& overrides);
  // All values, defaults included; parse() reads it back to the same run.
  std::string to_toml() const;
};

// Settings that differ between two runs, out.folder aside: "train.steps", and their values as TOML
// has them ("" where a run has no such setting).
struct SettingChange {
  std::string key, before, after;
  // Whether a run may go on under this change: it reads the same batches into the same tensors.
  bool allowed = true;
};
std::vector<SettingChange> changes(const RunFile& before, const RunFile& after);

// "lightning*3,softmax" repeated until it fills `layers` layers.
Result<std::vector<std::string>> expand_layer_pattern(const std::string& pattern,
                                                      std::int64_t layers);

}  // namespace everlong
