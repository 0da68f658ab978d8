#include "core/progress.h"
#include "data/prepare.h"
#include "library/public_api.h"
#include "train/loop.h"

namespace everlong::v1 {
namespace {

everlong::Result<RunFile> read_run(const TrainOptions& options) {
  if (options.run_file.empty() == options.run_text.empty())
    return invalid_argument(options.run_file.empty()
                                ? "no run is given: set TrainOptions::run_file or run_text"
                                : "TrainOptions::run_file and run_text are both set; give one");
  EVERLONG_ASSIGN(auto run, options.run_file.empty()
                                ? RunFile::parse(options.run_text, "run_text", options.settings)
                                : RunFile::read(options.run_file, options.settings));
  if (!options.out.empty()) run.out.folder = options.out;
  return run;
}

RunStart to_inner(TrainStart start) {
  switch (start) {
    case TrainStart::kResume:
      return RunStart::kResume;
    case TrainStart::kRestart:
      return RunStart::kRestart;
    case TrainStart::kNew:
      break;
  }
  return RunStart::kNew;
}

TrainReport to_public(const everlong::TrainReport& inner) {
  TrainReport report;
  report.model_folder = inner.model_folder.string();
  report.parameters = inner.parameters;
  report.steps = inner.steps;
  report.tokens = inner.tokens;
  report.seconds = inner.seconds;
  report.tokens_per_second = inner.tokens_per_second;
  report.loss = inner.loss;
  if (inner.valid) {
    report.valid_loss = inner.valid->loss;
    if (inner.valid->of_text) report.valid_bits_per_byte = inner.valid->bits_per_byte;
  }
  return report;
}

}  // namespace

Result<PrepareReport> prepare(const PrepareOptions& options) {
  return guarded([&]() -> Result<PrepareReport> {
    Progress::set_quiet(!options.progress);
    everlong::PrepareOptions inner;
    inner.tokenizer = options.tokenizer;
    inner.valid_fraction = options.valid_fraction;
    const auto made =
        everlong::prepare({options.texts.begin(), options.texts.end()}, options.out, inner);
    if (!made.ok()) return to_public(made.status());
    PrepareReport report;
    report.documents = made->documents;
    report.bytes = made->bytes;
    report.vocab_size = made->dataset.vocab_size;
    const auto tokens = [&](const char* split) {
      const auto found = made->dataset.splits.find(split);
      return found == made->dataset.splits.end() ? std::int64_t{0} : found->second.tokens;
    };
    report.train_tokens = tokens("train");
    report.valid_tokens = tokens("valid");
    return report;
  });
}

Result<TrainReport> train(const TrainOptions& options) {
  return guarded([&]() -> Result<TrainReport> {
    const auto run = read_run(options);
    if (!run.ok()) return to_public(run.status());
    Progress::set_quiet(!options.progress);
    bool stop = false;
    TrainHooks hooks;
    hooks.interrupted = [&] { return stop; };
    hooks.after_step = [&](const StepReport& step) {
      if (options.after_step)
        stop = !options.after_step({step.step, step.loss, step.lr, step.grad_norm, step.tokens});
    };
    const auto report = everlong::train(*run, hooks, to_inner(options.start));
    if (!report.ok()) return to_public(report.status());
    return to_public(*report);
  });
}

}  // namespace everlong::v1
