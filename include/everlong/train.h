// From text files to a trained model: what `everlong data prepare` and `everlong train` do.
#pragma once
#include <everlong/status.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

EVERLONG_NAMESPACE_BEGIN

struct PrepareOptions {
  std::vector<std::string> texts;   // files, and folders that are searched for text files
  std::string out;                  // dataset folder; a dataset that is there is replaced
  std::string tokenizer = "bytes";  // or a tokenizer.json, or a folder with one
  double valid_fraction = 0.1;      // of the documents, held out: 0 <= f < 1
  bool progress = false;            // on stderr
};

struct PrepareReport {
  std::int64_t documents = 0, bytes = 0;  // kept; every text counts once
  std::int64_t train_tokens = 0, valid_tokens = 0, vocab_size = 0;
};

// Reads every text twice and holds one shard of 2^26 tokens in memory. `out` is a dataset in full
// or not at all. Not thread safe.
Result<PrepareReport> prepare(const PrepareOptions& options);

struct TrainStep {
  std::int64_t step = 0;  // from 1
  double loss = 0;        // nats per predicted token
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  std::int64_t tokens = 0;   // of this step
};

// Where a run begins whose folder is not new.
enum class TrainStart {
  kNew,      // at the first step; refused where the folder holds a run that stopped before its end
  kResume,   // at the newest checkpoint that can be read; at the first step where there is none
  kRestart,  // at the first step, whatever the folder holds
};

struct TrainOptions {
  // A run file (TOML; recipes/ and docs/using.md show some), or its text: one of the two.
  std::string run_file, run_text;
  // "section.key=value" over it, such as "train.steps=100". Unknown keys are refused.
  std::vector<std::string> settings;
  std::string out;  // run folder, instead of the file's out.folder
  TrainStart start = TrainStart::kNew;
  bool progress = false;  // on stderr
  // After every step, on the calling thread; false: save and stop, with kInterrupted. What it
  // throws ends the run, with kInternal.
  std::function<bool(const TrainStep&)> after_step;
};

struct TrainReport {
  std::string model_folder;  // for Model::open
  std::int64_t parameters = 0, steps = 0, tokens = 0;
  double seconds = 0, tokens_per_second = 0;
  double loss = 0;  // nats per token, mean of the last steps (at most 20)
  // On held-out documents, where the dataset has any; the second of text only.
  std::optional<double> valid_loss, valid_bits_per_byte;
};

// Trains and writes the run folder (docs/formats.md, "Run folder"). A loss or gradient that is not
// finite, a setting or a file that does not fit stop the run with the reason. Not thread safe: one
// training run in a process at a time; it sets the threads and the random seed of the process.
Result<TrainReport> train(const TrainOptions& options);

EVERLONG_NAMESPACE_END
