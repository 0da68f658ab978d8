#include "train/loop.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <deque>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/progress.h"
#include "core/text.h"
#include "ops/runtime.h"
#include "train/gates.h"

namespace everlong {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kGateSteps = 100;  // between two reports of the gates

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One JSON object a line. The newest is held back until the next one comes or the run ends,
// whichever way, so that the last evaluation joins the last step's line.
class Log {
 public:
  explicit Log(const fs::path& path) : path_(path), file_(path, std::ios::trunc) {}
  ~Log() { (void)flush(); }
  Status add(nlohmann::ordered_json record) {
    EVERLONG_RETURN_IF_ERROR(flush());
    newest_ = std::move(record);
    return {};
  }
  nlohmann::ordered_json& newest() { return newest_; }
  Status flush() {
    if (!newest_.is_null()) file_ << newest_.dump() << std::endl;
    newest_ = nullptr;
    return file_ ? Status() : io_error(path_.string(), ": cannot write the log");
  }

 private:
  fs::path path_;
  std::ofstream file_;
  nlohmann::ordered_json newest_;
};

void add_evaluation(nlohmann::ordered_json& record, const Evaluation& evaluation) {
  record["valid_loss"] = evaluation.loss;
  if (evaluation.of_text) record["valid_bpb"] = evaluation.bits_per_byte;
}

std::string short_text(const Evaluation& evaluation) {
  return evaluation.of_text ? cat(", valid ", fixed(evaluation.bits_per_byte, 3), " bits/byte")
                            : cat(", valid ", fixed(evaluation.loss, 4));
}

// Means over the steps since the last record.
struct Interval {
  std::int64_t steps = 0, tokens = 0;
  double loss = 0;
  Clock::time_point start = Clock::now();
};

class Loop {
 public:
  Loop(const RunFile& run, const TrainHooks& hooks, std::unique_ptr<Trainer> trainer)
      : run_(run),
        hooks_(hooks),
        trainer_(std::move(trainer)),
        log_(fs::path(run.out.folder) / "log.jsonl"),
        progress_("train", run.train.steps, "steps") {}

  Result<TrainReport> run() {
    const auto& train = run_.train;
    EVERLONG_RETURN_IF_ERROR(log_.flush());
    reset_device_peak(trainer_->device());
    start_ = Clock::now();
    interval_ = {};
    for (double now = 0; trainer_->steps_done() < train.steps; now = seconds_since(start_)) {
      if (train.max_seconds > 0 && now >= train.max_seconds) break;
      EVERLONG_ASSIGN(const StepReport report, trainer_->step(now));
      EVERLONG_RETURN_IF_ERROR(after(report));
      if (hooks_.interrupted && hooks_.interrupted()) return stop();
    }
    return finish();
  }

 private:
  Status after(const StepReport& report) {
    const auto& train = run_.train;
    recent_.push_back(report.loss);
    if (recent_.size() > 20) recent_.pop_front();
    ++interval_.steps;
    interval_.tokens += report.tokens;
    interval_.loss += report.loss;
    const auto due = [&](std::int64_t every) { return every > 0 && report.step % every == 0; };
    std::optional<Evaluation> evaluation;
    const double interval_seconds = seconds_since(interval_.start);
    if (due(train.eval_every) && report.step < train.steps) {
      EVERLONG_ASSIGN(evaluation, evaluate());
    }
    if (due(train.log_every) || evaluation) {
      EVERLONG_RETURN_IF_ERROR(record(report, evaluation, interval_seconds));
    }
    if (due(train.save_every)) EVERLONG_RETURN_IF_ERROR(trainer_->save());
    if (hooks_.after_step) hooks_.after_step(report);
    show(report);
    return {};
  }

  Status record(const StepReport& report, const std::optional<Evaluation>& evaluation,
                double interval_seconds) {
    const auto memory = device_memory(trainer_->device());
    nlohmann::ordered_json line = {
        {"step", report.step},
        {"loss", interval_.loss / static_cast<double>(interval_.steps)},
        {"lr", report.lr},
        {"grad_norm", report.grad_norm},
        {"tokens", trainer_->tokens_done()},
        {"tok_s", static_cast<double>(interval_.tokens) / interval_seconds},
        {"mem_bytes", memory ? memory->peak : resident_bytes()},
        {"wall_s", seconds_since(start_)}};
    if (evaluation) add_evaluation(line, *evaluation);
    add_gates(line, report.step);
    interval_ = {};
    return log_.add(std::move(line));
  }

  // In every hundredth step's line, or the one after it.
  void add_gates(nlohmann::ordered_json& line, std::int64_t step) {
    if (step / kGateSteps == gates_logged_) return;
    gates_logged_ = step / kGateSteps;
    const auto gates = gates_of(trainer_->model());
    if (!gates) return;
    line["gates"] = {{"histogram", gates->histogram},
                     {"smallest", gates->smallest},
                     {"largest", gates->largest}};
    if (const auto alarm = gate_alarm(*gates, step)) line["alarm"] = *alarm;
  }

  void show(const StepReport& report) {
    const double seconds = seconds_since(start_);
    const double fraction = trainer_->schedule().fraction(report.step, seconds);
    const auto total = static_cast<std::int64_t>(static_cast<double>(report.step) / fraction + 0.5);
    progress_.set_total(std::min(total, run_.train.steps));
    const auto speed =
        static_cast<std::int64_t>(static_cast<double>(trainer_->tokens_done()) / seconds);
    progress_.update(report.step, cat("loss ", fixed(recent_loss(), 3), ", ", with_commas(speed),
                                      " tokens/s", valid_ ? short_text(*valid_) : ""));
  }

  // None when there is nothing to evaluate on.
  Result<std::optional<Evaluation>> evaluate() {
    EVERLONG_ASSIGN(const auto evaluation, trainer_->evaluate());
    if (evaluation.tokens > 0) valid_ = evaluation;
    return evaluation.tokens > 0 ? std::optional(evaluation) : std::nullopt;
  }

  double recent_loss() const {
    double sum = 0;
    for (const double loss : recent_) sum += loss;
    return recent_.empty() ? 0 : sum / static_cast<double>(recent_.size());
  }

  Status stop() {
    EVERLONG_RETURN_IF_ERROR(trainer_->save());
    progress_.finish();
    return {StatusCode::kInterrupted, cat("stopped after step ", trainer_->steps_done(),
                                          "; the model as it is now "
                                          "is in ",
                                          trainer_->model_folder().string())};
  }

  Result<TrainReport> finish() {
    TrainReport report;
    report.seconds = seconds_since(start_);
    EVERLONG_RETURN_IF_ERROR(trainer_->save());
    EVERLONG_ASSIGN(report.valid, evaluate());
    progress_.set_total(trainer_->steps_done());
    progress_.finish(cat("loss ", fixed(recent_loss(), 3), valid_ ? short_text(*valid_) : ""));
    if (report.valid && !log_.newest().is_null()) add_evaluation(log_.newest(), *report.valid);
    EVERLONG_RETURN_IF_ERROR(log_.flush());
    report.model_folder = trainer_->model_folder();
    report.parameters = trainer_->model().parameter_count();
    report.steps = trainer_->steps_done();
    report.tokens = trainer_->tokens_done();
    report.tokens_per_second = static_cast<double>(report.tokens) / report.seconds;
    report.epochs = trainer_->epochs();
    report.loss = recent_loss();
    return report;
  }

  const RunFile& run_;
  const TrainHooks& hooks_;
  std::unique_ptr<Trainer> trainer_;
  Log log_;
  Progress progress_;
  Clock::time_point start_ = Clock::now();
  Interval interval_;
  std::int64_t gates_logged_ = 0;
  std::deque<double> recent_;
  std::optional<Evaluation> valid_;
};

}  // namespace

Result<TrainReport> train(const RunFile& run, const TrainHooks& hooks) try {
  const fs::path folder = run.out.folder;
  EVERLONG_ASSIGN(auto trainer, Trainer::make(run));
  EVERLONG_RETURN_IF_ERROR(make_directories(folder));
  EVERLONG_RETURN_IF_ERROR(write_file(folder / "run.toml", run.to_toml()));
  return Loop(run, hooks, std::move(trainer)).run();
} catch (const c10::OutOfMemoryError&) {
  return unsupported(
      "the device is out of memory; lower data.rows, data.row_tokens or train.segment_tokens, or "
      "set "
      "train.checkpointing = true");
} catch (const c10::Error& error) {
  return invalid_argument(error.what_without_backtrace());
}

}  // namespace everlong
