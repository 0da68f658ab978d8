#include "train/loop.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "core/folder_lock.h"
#include "core/progress.h"
#include "core/text.h"
#include "ops/runtime.h"
#include "train/event_file.h"
#include "train/gates.h"
#include "train/loop_state.h"
#include "train/run_log.h"

namespace everlong {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kGateSteps = 100;   // between two reports of the gates
constexpr std::size_t kRecentLosses = 20;  // whose mean the report gives
constexpr const char* kBestFolder = "best";
constexpr const char* kCheckpointsFolder = "checkpoints";
constexpr const char* kLogName = "log.jsonl";

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

nlohmann::ordered_json log_members(const Evaluation& evaluation) {
  nlohmann::ordered_json members = {{"valid_loss", evaluation.loss}};
  if (evaluation.of_text) members["valid_bpb"] = evaluation.bits_per_byte;
  return members;
}

// Every number of a line of the log but the step: "train/loss", "valid/loss", "train/gates/...".
Scalars scalars_of(const nlohmann::ordered_json& line) {
  constexpr std::string_view kValid = "valid_";
  Scalars scalars;
  for (const auto& [key, value] : line.items()) {
    if (!value.is_number() || key == "step") continue;
    const bool valid = key.starts_with(kValid);
    scalars.emplace_back(valid ? "valid/" + key.substr(kValid.size()) : "train/" + key,
                         value.get<double>());
  }
  return scalars;
}

std::string short_text(const Evaluation& evaluation) {
  return evaluation.of_text ? cat(", valid ", fixed(evaluation.bits_per_byte, 3), " bits/byte")
                            : cat(", valid ", fixed(evaluation.loss, 4));
}

class Loop {
 public:
  Loop(const RunFile& run, const TrainHooks& hooks, std::unique_ptr<Trainer> trainer,
       CheckpointStore store, RunLog log)
      : run_(run),
        hooks_(hooks),
        trainer_(std::move(trainer)),
        store_(std::move(store)),
        log_(std::move(log)),
        progress_("train", run.train.steps, "steps") {}

  // Goes on from there.
  void restore(LoopState state) { state_ = std::move(state); }

  Result<TrainReport> run() {
    const auto& train = run_.train;
    const fs::path folder = run_.out.folder;
    if (train.tensorboard) {
      const auto& newest = log_.newest();
      const bool resumed = trainer_->steps_done() > 0;
      EVERLONG_ASSIGN(auto events,
                      EventFile::create(folder, !resumed           ? -1
                                                : newest.is_null() ? 0
                                                                   : newest.value("step", 0)));
      events_.emplace(std::move(events));
      if (!newest.is_null()) EVERLONG_RETURN_IF_ERROR(show_events(newest));
    }
    EVERLONG_RETURN_IF_ERROR(log_.flush());
    reset_device_peak(trainer_->device());
    const auto ago = [](double seconds) {
      return Clock::now() -
             std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    };
    start_ = ago(state_.seconds);
    interval_start_ = ago(state_.interval.seconds);
    last_save_ = Clock::now();
    for (double now = state_.seconds; trainer_->steps_done() < train.steps;
         now = seconds_since(start_)) {
      if (train.max_seconds > 0 && now >= train.max_seconds) break;
      const auto report = trainer_->step(now);
      if (!report.ok()) return with_last_checkpoint(report.status());
      EVERLONG_RETURN_IF_ERROR(after(*report));
      if (hooks_.interrupted && hooks_.interrupted()) return stop();
    }
    return finish();
  }

  // Of a run that had come to its end.
  TrainReport report() const {
    TrainReport report;
    report.model_folder = trainer_->model_folder();
    report.parameters = trainer_->model().parameter_count();
    report.steps = trainer_->steps_done();
    report.tokens = trainer_->tokens_done();
    report.seconds = state_.seconds;
    report.tokens_per_second = static_cast<double>(report.tokens) / report.seconds;
    report.epochs = trainer_->epochs();
    report.loss = recent_loss();
    report.valid = state_.valid;
    return report;
  }

 private:
  Status after(const StepReport& report) {
    const auto& train = run_.train;
    auto& recent = state_.recent;
    recent.push_back(report.loss);
    if (recent.size() > kRecentLosses) recent.erase(recent.begin());
    auto& interval = state_.interval;
    ++interval.steps;
    interval.tokens += report.tokens;
    interval.loss += report.loss;
    const auto due = [&](std::int64_t every) { return every > 0 && report.step % every == 0; };
    std::optional<Evaluation> evaluation;
    const double interval_seconds = seconds_since(interval_start_);
    if (due(train.eval_every) && report.step < train.steps) {
      EVERLONG_ASSIGN(evaluation, evaluate());
    }
    if (due(train.log_every) || evaluation) {
      EVERLONG_RETURN_IF_ERROR(record(report, evaluation, interval_seconds));
    }
    const bool late = train.save_seconds > 0 && seconds_since(last_save_) >= train.save_seconds;
    if ((due(train.save_every) || late) && report.step < train.steps)
      EVERLONG_RETURN_IF_ERROR(save(/*finished=*/false));
    if (hooks_.after_step) hooks_.after_step(report);
    show(report);
    return {};
  }

  Status record(const StepReport& report, const std::optional<Evaluation>& evaluation,
                double interval_seconds) {
    const auto memory = device_memory(trainer_->device());
    const auto& interval = state_.interval;
    nlohmann::ordered_json line = {
        {"step", report.step},
        {"loss", interval.loss / static_cast<double>(interval.steps)},
        {"lr", report.lr},
        {"grad_norm", report.grad_norm},
        {"tokens", trainer_->tokens_done()},
        {"tok_s", static_cast<double>(interval.tokens) / interval_seconds},
        {"mem_bytes", memory ? memory->peak : resident_bytes()},
        {"wall_s", seconds_since(start_)}};
    if (evaluation) line.update(log_members(*evaluation));
    add_gates(line, report.step);
    state_.interval = {};
    interval_start_ = Clock::now();
    EVERLONG_RETURN_IF_ERROR(show_events(line));
    return log_.add(std::move(line));
  }

  Status show_events(const nlohmann::ordered_json& line) {
    return events_ ? events_->add(line.at("step"), scalars_of(line)) : Status();
  }

  // In every hundredth step's line, or the one after it.
  void add_gates(nlohmann::ordered_json& line, std::int64_t step) {
    if (step / kGateSteps == state_.gates_logged) return;
    state_.gates_logged = step / kGateSteps;
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
                                      " tokens/s", state_.valid ? short_text(*state_.valid) : ""));
  }

  // None when there is nothing to evaluate on.
  Result<std::optional<Evaluation>> evaluate() {
    EVERLONG_ASSIGN(const auto evaluation, trainer_->evaluate());
    if (evaluation.tokens == 0) return std::optional<Evaluation>();
    state_.valid = evaluation;
    if (!state_.best || evaluation.loss < *state_.best) {
      state_.best = evaluation.loss;
      if (run_.train.keep_best && run_.train.eval_every > 0)
        EVERLONG_RETURN_IF_ERROR(trainer_->save(fs::path(run_.out.folder) / kBestFolder));
    }
    return std::optional(evaluation);
  }

  double recent_loss() const {
    double sum = 0;
    for (const double loss : state_.recent) sum += loss;
    return state_.recent.empty() ? 0 : sum / static_cast<double>(state_.recent.size());
  }

  // The checkpoint first: the model folder can be made from it again, not the other way round. What
  // the log says of the steps before it must not be lost after it counts.
  Status save(bool finished) {
    EVERLONG_RETURN_IF_ERROR(log_.sync());
    if (run_.train.keep_checkpoints > 0) {
      if (!finished) state_.seconds = seconds_since(start_);  // else as finish() has it
      state_.interval.seconds = seconds_since(interval_start_);
      state_.lines = log_.lines();
      state_.line = log_.newest();
      EVERLONG_ASSIGN(auto content, trainer_->snapshot());
      content.metadata["finished"] = finished ? "true" : "false";
      content.metadata["loop"] = to_json(state_).dump();
      if (finished) store_.set_keep(1);
      EVERLONG_RETURN_IF_ERROR(store_.save(trainer_->steps_done(), content));
    }
    EVERLONG_RETURN_IF_ERROR(finished ? Status() : trainer_->save());
    last_save_ = Clock::now();
    return {};
  }

  Status stop() {
    EVERLONG_RETURN_IF_ERROR(save(/*finished=*/false));
    progress_.finish();
    return {StatusCode::kInterrupted,
            cat("stopped after step ", trainer_->steps_done(), "; the model as it is now is in ",
                trainer_->model_folder().string(),
                run_.train.keep_checkpoints > 0 ? ", and --resume goes on from here" : "")};
  }

  Status with_last_checkpoint(const Status& status) const {
    if (status.code() != StatusCode::kInvalidArgument) return status;
    return {status.code(),
            cat(status.message(), ". ",
                store_.last_saved().empty()
                    ? std::string("There is no checkpoint yet")
                    : cat("The last good checkpoint is ", store_.last_saved().string(),
                          ": --resume --set train.learning_rate=... goes on from there"))};
  }

  Result<TrainReport> finish() {
    state_.seconds = seconds_since(start_);
    EVERLONG_RETURN_IF_ERROR(trainer_->save());
    EVERLONG_ASSIGN(const auto evaluation, evaluate());
    progress_.set_total(trainer_->steps_done());
    progress_.finish(
        cat("loss ", fixed(recent_loss(), 3), evaluation ? short_text(*evaluation) : ""));
    state_.valid = evaluation;
    if (evaluation && !log_.newest().is_null()) {
      auto members = log_members(*evaluation);
      EVERLONG_RETURN_IF_ERROR(log_.amend(members));
      members["step"] = log_.newest().at("step");
      EVERLONG_RETURN_IF_ERROR(show_events(members));  // the step's other figures are there already
    }
    EVERLONG_RETURN_IF_ERROR(save(/*finished=*/true));
    return report();
  }

  const RunFile& run_;
  const TrainHooks& hooks_;
  std::unique_ptr<Trainer> trainer_;
  CheckpointStore store_;
  RunLog log_;
  Progress progress_;
  std::optional<EventFile> events_;
  LoopState state_;
  Clock::time_point start_ = Clock::now(), interval_start_ = start_, last_save_ = start_;
};

// Nothing of an earlier run in this folder may be taken for this one's.
Status clear_run(const fs::path& folder, CheckpointStore& store) {
  EVERLONG_RETURN_IF_ERROR(store.clear());
  EVERLONG_RETURN_IF_ERROR(EventFile::clear(folder));
  std::error_code error;
  for (const char* name : {kBestFolder, "train.json"}) {
    fs::remove_all(folder / name, error);
    if (error) return io_error((folder / name).string(), ": cannot be removed: ", error.message());
  }
  return {};
}

Status check_changes(const TensorFile& checkpoint, const RunFile& run, const Note& note) {
  EVERLONG_ASSIGN(const auto text, metadata_entry(checkpoint, "run"));
  EVERLONG_ASSIGN(const auto before, RunFile::parse(text, "the checkpoint's run", {}));
  for (const auto& change : changes(before, run)) {
    const auto shown = [](const std::string& value) { return value.empty() ? "absent" : value; };
    const std::string what =
        cat(change.key, " was ", shown(change.before), " and is ", shown(change.after));
    if (!change.allowed)
      return invalid_argument(run.name, ": ", what,
                              "; a run cannot go on under that change. Set it back, or begin anew "
                              "with --restart");
    note(cat(what, " from here on"));
  }
  return {};
}

Result<TrainReport> train_in_folder(const RunFile& run, const TrainHooks& hooks, RunStart start) {
  const fs::path folder = run.out.folder;
  const Note note = [&](const std::string& line) {
    if (hooks.note) hooks.note(line);
  };
  EVERLONG_RETURN_IF_ERROR(make_directories(folder));
  EVERLONG_ASSIGN(const auto lock, FolderLock::take(folder, "another training"));
  CheckpointStore store(folder / kCheckpointsFolder,
                        std::max<std::int64_t>(run.train.keep_checkpoints, 1));
  if (start == RunStart::kNew && !store.empty() && !store.finished())
    return invalid_argument(folder.string(), ": holds a run that stopped before its end (",
                            store.files().front().filename().string(),
                            "). Go on with --resume, or begin anew with --restart, which removes "
                            "its checkpoints; --out writes elsewhere");
  std::optional<CheckpointStore::Found> found;
  if (start == RunStart::kResume) {
    EVERLONG_ASSIGN(found, store.newest(note));
    if (!found) note(cat(folder.string(), ": no checkpoint; the run begins at its first step"));
  }
  if (!found) {
    EVERLONG_ASSIGN(auto trainer, Trainer::make(run));
    EVERLONG_RETURN_IF_ERROR(clear_run(folder, store));
    EVERLONG_RETURN_IF_ERROR(write_file(folder / "run.toml", run.to_toml()));
    EVERLONG_ASSIGN(auto log, RunLog::create(folder / kLogName));
    return Loop(run, hooks, std::move(trainer), std::move(store), std::move(log)).run();
  }
  const auto in_checkpoint = [&](const Status& status) { return status.at(found->path.string()); };
  if (const auto status = check_changes(found->content, run, note); !status.ok()) return status;
  auto state = loop_state_from(found->content);
  if (!state.ok()) return in_checkpoint(state.status());
  auto trainer = Trainer::make(run, &found->content);
  if (!trainer.ok()) return in_checkpoint(trainer.status());
  const bool finished = store.finished();
  found->content = {};  // its tensors are the trainer's now
  EVERLONG_RETURN_IF_ERROR(write_file(folder / "run.toml", run.to_toml()));
  EVERLONG_ASSIGN(auto log, RunLog::resume(folder / kLogName, state->line, state->lines, note));
  const std::int64_t step = (*trainer)->steps_done();
  const bool over = step >= run.train.steps ||
                    (run.train.max_seconds > 0 && state->seconds >= run.train.max_seconds);
  Loop loop(run, hooks, *std::move(trainer), std::move(store), std::move(log));
  loop.restore(*std::move(state));
  if (finished && over) {
    note(cat(folder.string(), ": the run is finished, at step ", step,
             "; with more train.steps it would go on"));
    return loop.report();
  }
  note(cat(folder.string(), ": goes on after step ", step, " of ", run.train.steps));
  return loop.run();
}

}  // namespace

Result<TrainReport> train(const RunFile& run, const TrainHooks& hooks, RunStart start) try {
  return train_in_folder(run, hooks, start);
} catch (const c10::OutOfMemoryError&) {
  return unsupported(
      "the device is out of memory; lower data.rows, data.row_tokens or train.segment_tokens, or "
      "set "
      "train.checkpointing = true");
} catch (const c10::Error& error) {
  return invalid_argument(error.what_without_backtrace());
}

}  // namespace everlong
