// A model in training: weights, optimiser and data, one step at a time.
#pragma once
#include <memory>

#include "data/batches.h"
#include "models/checkpoint.h"
#include "train/adamw.h"
#include "train/backprop.h"
#include "train/run_file.h"
#include "train/schedule.h"

namespace everlong {

struct StepReport {
  std::int64_t step = 0;  // from 1
  double loss = 0;        // nats per predicted token, over all batches of the step; weighed where
                          // the data say how much each counts
  double lr = 0;
  double grad_norm = 0;  // before clipping
  std::int64_t tokens = 0;
};

struct Evaluation {
  double loss = 0;           // nats per predicted token, weighed as in training
  double bits_per_byte = 0;  // of text, the end-of-document tokens' loss included
  bool of_text =
      true;  // false: the data have targets of their own, and bits_per_byte means nothing
  std::int64_t tokens = 0;
};

// Not thread safe. The same run file on the same CPU with the same number of threads gives the same
// losses bit for bit, unless max_seconds lets the clock decide.
class Trainer {
 public:
  // Sets torch's threads and random seed, opens the data, builds or loads the model. With a
  // snapshot it goes on exactly where that was taken; refused where model, batches or data are
  // others (docs/formats.md, "Training checkpoint").
  static Result<std::unique_ptr<Trainer>> make(const RunFile& run,
                                               const TensorFile* snapshot = nullptr);

  // One update of the weights, `seconds` into the run. A loss or gradient that is not finite is
  // refused with step and layer in the message, and the weights stay as they were.
  Result<StepReport> step(double seconds);
  // The first eval_tokens tokens of the validation split, read as one stream with carried state.
  Result<Evaluation> evaluate();
  // The model folder OUT/model, each file replaced atomically.
  Status save() const { return save(model_folder()); }
  Status save(const fs::path& folder) const;
  // All that the next steps depend on, as tensors and metadata. Handles where they can be: write it
  // before the next step.
  Result<TensorFile> snapshot() const;

  Decoder& model() { return *model_; }
  AdamW& optimizer() { return *optimizer_; }
  const Schedule& schedule() const { return schedule_; }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }
  std::int64_t steps_done() const { return steps_done_; }
  std::int64_t tokens_done() const { return tokens_done_; }
  double epochs() const { return reader_->epochs(); }
  fs::path model_folder() const { return fs::path(run_.out.folder) / "model"; }

 private:
  Trainer(const RunFile& run, at::Device device, at::ScalarType dtype)
      : run_(run), device_(device), dtype_(dtype) {}
  Status build_model(const TokenDataset& dataset, const TensorFile* snapshot);
  Status restore(const TensorFile& snapshot);
  Status diverged(const StepReport& report);

  RunFile run_;
  at::Device device_;
  at::ScalarType dtype_;
  Schedule schedule_;
  std::shared_ptr<Decoder> model_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<Backprop> backprop_;
  std::unique_ptr<BatchReader> reader_;
  std::unique_ptr<SplitView> valid_;  // none when the dataset has no validation split
  std::vector<Batch> batches_;        // of one step
  std::string data_hash_;             // of dataset.json
  std::int64_t steps_done_ = 0, tokens_done_ = 0;
};

}  // namespace everlong
