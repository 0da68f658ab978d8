#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/model_speed.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "eval/op_speed.h"
#include "ops/runtime.h"

namespace everlong::cli {
namespace {

struct OpCommand {
  OpBenchCase wanted;
  PlaceOptions place;
  std::vector<std::int64_t> lengths = {1024, 4096, 16384};
  std::int64_t heads = 8, kv_heads = 0, head_dim = 64, value_dim = 0, batch = 1;
  std::string params;
  bool json = false;

  Status run();

 private:
  static void add_row(Table& table, const nlohmann::ordered_json& record);
};

void OpCommand::add_row(Table& table, const nlohmann::ordered_json& record) {
  const auto milliseconds = [&](const char* key) {
    return record.at(key).is_number() ? fixed(1e3 * record.at(key).get<double>(), 3)
                                      : std::string("-");
  };
  const auto rate = static_cast<std::int64_t>(record.at("tokens_per_second").get<double>());
  table.add({with_commas(record.at("tokens").get<std::int64_t>()), milliseconds("seconds"),
             milliseconds("seconds_min"), milliseconds("seconds_max"), with_commas(rate),
             milliseconds("baseline_seconds"),
             record.at("ratio").is_number() ? fixed(record.at("ratio").get<double>(), 2) : "-",
             fixed(record.at("fraction_of_ceiling").get<double>(), 3),
             cat(record.at("max_rel_error").get<double>())});
}

Status OpCommand::run() {
  EVERLONG_ASSIGN(const auto where, place.resolve());
  wanted.device = where.device;
  wanted.dtype = where.dtype;
  wanted.shape.batch = batch;
  wanted.shape.heads = heads;
  wanted.shape.kv_heads = kv_heads > 0 ? kv_heads : heads;
  wanted.shape.key_dim = head_dim;
  wanted.shape.value_dim = value_dim > 0 ? value_dim : head_dim;
  wanted.shape.params =
      params.empty() ? nlohmann::json::object() : nlohmann::json::parse(params, nullptr, false);
  if (!wanted.shape.params.is_object())
    return invalid_argument("--params ", params,
                            " is not a JSON object such as {\"window\": 1024}");

  const Ceilings ceilings = measure_ceilings(wanted.device, wanted.dtype);
  Table table({"tokens", "ms", "min", "max", "tokens/s", cat(wanted.baseline, " ms"), "ratio",
               "of ceiling", "error"});
  Status status;
  wanted.short_tokens = lengths.empty() ? 0 : lengths.front();
  for (const auto tokens : lengths) {
    wanted.shape.tokens = tokens;
    EVERLONG_ASSIGN(const auto result, bench_op(wanted, ceilings));
    if (json) print_json(result.record);
    if (!result.passed && status.ok())
      status = invalid_argument(tokens, " tokens: ", result.record.at("error").get<std::string>());
    if (result.passed && !json) add_row(table, result.record);
  }
  if (!json)
    print(cat(wanted.mechanism, " ", wanted.pass, ", ", dtype_name(wanted.dtype), " on ",
              machine_name(wanted.device),
              wanted.device.is_cpu() ? cat(", ", threads(), " threads") : "", "; ",
              wanted.shape.heads, " heads of ", wanted.shape.key_dim, "; ceilings ",
              fixed(ceilings.flops / 1e9, 0), " GFLOP/s, ", fixed(ceilings.bytes / 1e9, 1),
              " GB/s\n", table.text()));
  return status;
}

struct ModelCommand {
  std::string source;
  PlaceOptions place;
  ModelBenchOptions options;
  bool json = false;

  Status run() const;
};

Status ModelCommand::run() const {
  EVERLONG_ASSIGN(const auto where, place.resolve());
  EVERLONG_ASSIGN(const auto config, read_any_config(source));
  Table table({"tokens", "training tokens/s", "peak memory", "reading tokens/s", "writing tokens/s",
               "state"});
  for (const auto tokens : options.lengths) {
    EVERLONG_ASSIGN(const auto speed, bench_model(config, where, tokens, options));
    if (json) {
      nlohmann::ordered_json object = {{"model", source}};
      object.update(to_json(speed));
      object.update(describe(where));
      print_json(object);
      continue;
    }
    const auto rate = [](const Spread& speeds) {
      return speeds.repeats > 0 ? with_commas(static_cast<std::int64_t>(speeds.median))
                                : std::string("-");
    };
    const auto size = [](std::int64_t bytes) { return human_bytes(static_cast<double>(bytes)); };
    table.add({with_commas(speed.tokens),
               speed.trouble.empty() ? rate(speed.training) : speed.trouble,
               size(speed.training_peak_bytes), rate(speed.reading), rate(speed.writing),
               size(speed.state_bytes)});
  }
  if (!json)
    print(cat(dtype_name(where.dtype), " on ", machine_name(where.device), ", ", options.rows,
              " rows\n", table.text()));
  return {};
}

}  // namespace

void add_bench(Command& program) {
  Command bench = program.subcommand("bench", "Time an operator or a whole model by length");

  static OpCommand op_command;
  Command op = bench.subcommand(
      "op", "Time one operator of a mechanism",
      "Times one operator over sequence lengths. Before a case is timed its result is compared "
      "with float64; a wrong result has no speed: then only the error is printed and the exit code "
      "is 1. The baseline is timed in turns with it. Ceilings (a large matrix product, a large "
      "copy) are measured in the same process.");
  op.option("--mechanism NAME", op_command.wanted.mechanism, "see everlong info");
  op.option("--kind NAME", op_command.wanted.kind, "operator of the mechanism; default: its first");
  op.option("--form NAME", op_command.wanted.form,
            "auto: the device's kernel where there is one, else composite");
  op.choice("--pass", op_command.wanted.pass, {"forward", "train", "step"},
            "train: forward and backward; step: one token after so many");
  op.choice(
      "--baseline", op_command.wanted.baseline,
      {"composite", "naive", "sdpa", "released", "short", "none"},
      "sdpa: torch's softmax attention over the same shapes; released (longnet): the published "
      "code's steps in tensor operations around it; short: the same tokens in sequences of the "
      "first length, so a ratio of 1 says that a token's cost does not grow");
  op.option("--lengths N,N,...", op_command.lengths, "tokens of a sequence");
  op.option("--batch N", op_command.batch, "sequences at once");
  op.option("--heads N", op_command.heads, "query heads");
  op.option("--kv-heads N", op_command.kv_heads, "key and value heads; 0: as many as query heads");
  op.option("--head-dim N", op_command.head_dim, "of queries and keys");
  op.option("--value-dim N", op_command.value_dim, "of values; 0: as the keys");
  op.option("--params JSON", op_command.params,
            "parameters of the operator, e.g. {\"window\": 1024}");
  op_command.place.add(op);
  op.flag("--json", op_command.json, "one JSON object a line; docs/benchmarks.md lists the fields");
  op.example(
      "everlong bench op --mechanism lightning --pass train --lengths 1K,4K,16K --baseline sdpa "
      "--threads 2");
  op.run([] { return op_command.run(); });

  static ModelCommand model_command;
  Command model = bench.subcommand("model", "Training and streaming speed of a model by length",
                                   "Times a model on random tokens: training (forward, backward, "
                                   "update) over rows of each length, reading a prompt "
                                   "of each length through a stream, and writing token by token "
                                   "after it. Weights are random where only a "
                                   "configuration is given: speed does not depend on them.");
  model.positional("MODEL", model_command.source, true,
                   "a model or run folder, a config.json, or a run file (.toml)");
  model.option("--lengths N,N,...", model_command.options.lengths, "tokens of a row");
  model.option("--rows N", model_command.options.rows, "rows of a training batch");
  model.option("--feed N", model_command.options.feed, "tokens fed at a time when reading");
  model.flag("--checkpointing", model_command.options.checkpointing,
             "recompute activations in the backward pass");
  model.flag("--no-training", model_command.options.no_training, "only reading and writing");
  model_command.place.add(model);
  model.flag("--json", model_command.json, "one JSON object a line");
  model.example("everlong bench model recipes/lightning_demo.toml --lengths 1K,4K,16K");
  model.example("everlong bench model runs/demo --device cuda --lengths 1K,16K,128K --json");
  model.run([] { return model_command.run(); });
}

}  // namespace everlong::cli
