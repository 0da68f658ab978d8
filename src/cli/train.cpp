#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/json_lines.h"
#include "core/text.h"
#include "train/loop.h"

namespace everlong::cli {
namespace {

struct TrainCommand {
  std::string file, out;
  std::vector<std::string> settings;
  bool json = false, show = false, resume = false, restart = false;

  // A run folder stands for the run.toml in it, and is then where the run goes.
  Result<RunFile> read() const {
    const bool folder = fs::is_directory(file);
    EVERLONG_ASSIGN(auto run_file,
                    RunFile::read(folder ? fs::path(file) / "run.toml" : fs::path(file), settings));
    if (folder) run_file.out.folder = file;
    if (!out.empty()) run_file.out.folder = out;
    return run_file;
  }

  Status run() const {
    if (resume && restart)
      return invalid_argument(
          "--resume and --restart exclude each other: one goes on with the run in the folder, the "
          "other removes it");
    EVERLONG_ASSIGN(const auto run_file, read());
    if (show) {
      print(run_file.to_toml());
      return {};
    }
    PlaceOptions place_options{run_file.train.device, run_file.train.dtype, run_file.train.threads};
    EVERLONG_ASSIGN(const auto place, place_options.resolve());
    note(cat(run_file.name, " -> ", run_file.out.folder, ", on ", place.device.str()));
    catch_signals();
    const TrainHooks hooks{.interrupted = [] { return caught_signal() != 0; },
                           .after_step = {},
                           .note = [](const std::string& line) { note(line); }};
    EVERLONG_ASSIGN(const auto report, train(run_file, hooks,
                                             resume    ? RunStart::kResume
                                             : restart ? RunStart::kRestart
                                                       : RunStart::kNew));
    nlohmann::ordered_json object = {{"model", report.model_folder.string()},
                                     {"parameters", report.parameters},
                                     {"steps", report.steps},
                                     {"tokens", report.tokens},
                                     {"epochs", report.epochs},
                                     {"seconds", report.seconds},
                                     {"tokens_per_second", report.tokens_per_second},
                                     {"loss", report.loss}};
    if (report.valid) {
      object["valid_loss"] = report.valid->loss;
      if (report.valid->of_text) object["valid_bits_per_byte"] = report.valid->bits_per_byte;
      object["valid_tokens"] = report.valid->tokens;
    }
    object.update(describe(place));
    EVERLONG_RETURN_IF_ERROR(
        write_file(fs::path(run_file.out.folder) / "train.json", checked_json_line(object)));
    if (json) {
      print_json(object);
      return {};
    }
    print(cat(with_commas(report.parameters), " parameters, ", with_commas(report.steps),
              " steps, ", with_commas(report.tokens), " tokens in ", human_duration(report.seconds),
              " (", with_commas(static_cast<std::int64_t>(report.tokens_per_second)), " tokens/s, ",
              fixed(report.epochs, 2), " times through the text)\nloss ", fixed(report.loss, 4),
              " nats per token",
              report.valid ? cat("; held out ", fixed(report.valid->loss, 4)) : "",
              report.valid && report.valid->of_text
                  ? cat(" (", fixed(report.valid->bits_per_byte, 4), " bits per byte)")
                  : "",
              "\nmodel: ", report.model_folder.string(), "\n"));
    return {};
  }
};

}  // namespace

void add_train(Command& program) {
  static TrainCommand command;
  Command train = program.subcommand("train", "Train a model as a run file says",
                                     "Trains a model as a run file says: model, data, optimiser "
                                     "and schedule in TOML. Writes the run folder: run.toml "
                                     "(every setting, defaults included), log.jsonl (a line a "
                                     "step), events for TensorBoard, checkpoints, train.json and "
                                     "the model.\n\nCtrl-C (or SIGTERM) saves and stops; twice "
                                     "stops at once. --resume goes on from the newest checkpoint, "
                                     "also after a crash, to the same losses bit for bit on a CPU: "
                                     "train.save_every and train.save_seconds say how much a "
                                     "crash can cost.");
  train.positional("RUN.toml", command.file, true,
                   "run file (recipes/ holds some), or a run folder: the run.toml in it");
  train.option("--set KEY=VALUE", command.settings,
               "override one setting, e.g. train.steps=100; may be repeated");
  train.option("-o,--out DIR", command.out, "run folder, instead of the file's out.folder");
  train.flag(
      "--resume", command.resume,
      "go on with the run in the folder; where it has no checkpoint, begin. A script that is "
      "killed and started again can always say it");
  train.flag("--restart", command.restart,
             "begin anew where the folder holds a run that stopped before its end, and remove its "
             "checkpoints");
  train.flag("--show", command.show, "print the run with all its settings and stop");
  train.flag("--json", command.json, "print one JSON object at the end");
  train.example("everlong train recipes/lightning_demo.toml");
  train.example(
      "everlong train recipes/lightning_demo.toml --set train.steps=50 --set "
      "train.learning_rate=1e-3 --out runs/try");
  train.example("everlong train runs/try --resume", "go on after Ctrl-C or a crash");
  train.example("everlong train runs/try --resume --set train.steps=100",
                "or longer than was planned: what differs is said");
  train.example("everlong train recipes/lightning_demo.toml --show", "all settings that there are");
  train.run([] { return command.run(); });
}

}  // namespace everlong::cli
