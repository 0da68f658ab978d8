#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/progress.h"
#include "data/staging.h"
#include "models/convert.h"
#include "models/published.h"

namespace everlong::cli {
namespace {

constexpr std::int64_t kMegabyte = 1'000'000;

struct ConvertCommand {
  std::string from, out, to = "everlong", dtype = "keep", max_shard_size = "5GB";
  std::string update = "linear";
  std::int64_t segment = 2048;
  std::optional<double> gate_init;
  bool infini = false, json = false;

  Status run() const;

 private:
  Result<ConvertReport> convert(const fs::path& input, const fs::path& staging) const;
};

// "5GB" and "5G" are 5 * 10^9, as transformers counts shards; "5GiB" is 5 * 2^30; "800MB"; a plain
// number is bytes.
std::optional<std::int64_t> parse_bytes(std::string_view text) {
  struct Unit {
    std::string_view suffix;
    double bytes;
  };
  constexpr Unit kUnits[] = {{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"KB", 1e3},
                             {"MB", 1e6},      {"GB", 1e9},      {"K", 1e3},       {"M", 1e6},
                             {"G", 1e9},       {"", 1}};
  for (const Unit& unit : kUnits) {
    if (!text.ends_with(unit.suffix)) continue;
    const auto number = parse_number(text.substr(0, text.size() - unit.suffix.size()));
    if (!number || !(*number * unit.bytes >= 1) || *number * unit.bytes > 1e18) return std::nullopt;
    return static_cast<std::int64_t>(*number * unit.bytes);
  }
  return std::nullopt;
}

std::string size_text(std::int64_t bytes) { return human_bytes(static_cast<double>(bytes)); }

Result<ConvertReport> ConvertCommand::convert(const fs::path& input,
                                              const fs::path& staging) const {
  ConvertOptions options;
  options.to = to;
  const auto shard = parse_bytes(max_shard_size);
  if (!shard)
    return invalid_argument("--max-shard-size ", max_shard_size,
                            " is no size; give bytes, or a number with MB, GB, MiB or GiB");
  options.max_shard_bytes = *shard;
  if (dtype != "keep") options.dtype = to_scalar_type(*dtype_from_name(dtype));
  if (infini) {
    options.infini = {{"segment", segment}, {"update", update}};
    if (gate_init) (*options.infini)["gate_init"] = *gate_init;
  }
  std::unique_ptr<Progress> bar;
  options.progress = [&](std::int64_t done, std::int64_t total) -> Status {
    if (caught_signal() != 0)
      return {StatusCode::kInterrupted, cat("interrupted; ", out, " was not written")};
    if (!bar) bar = std::make_unique<Progress>("convert", total / kMegabyte, "MB");
    bar->update(done / kMegabyte);
    return {};
  };
  return convert_model(input, staging, options);
}

Status ConvertCommand::run() const {
  catch_signals();
  const fs::path input = model_folder(from);
  fs::path target = fs::path(out).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // "OUT/"
  std::error_code ignored;
  if (fs::exists(target, ignored) &&
      !(fs::is_directory(target, ignored) && fs::is_empty(target, ignored)))
    return invalid_argument(
        target.string(),
        " is there already; nothing is overwritten. Remove it or give another OUT");
  const fs::path parent = target.has_parent_path() ? target.parent_path() : fs::path(".");
  EVERLONG_ASSIGN(const auto staging, StagingFolder::create(parent, target.filename().string()));
  EVERLONG_ASSIGN(const ConvertReport report, convert(input, staging.path()));
  EVERLONG_RETURN_IF_ERROR(rename_file(staging.path(), target));
  if (json) {
    print_json({{"model", target.string()},
                {"dialect", report.dialect},
                {"parameters", report.parameters},
                {"tensors", report.tensors},
                {"files", report.files},
                {"bytes", report.bytes},
                {"copied", report.copied}});
    return {};
  }
  print(cat(target.string(), ": ", with_commas(report.parameters), " parameters, ",
            size_text(report.bytes), " in ", report.files, report.files == 1 ? " file" : " files",
            ", written as ", report.dialect, "\n"));
  if (report.copied.empty()) {
    note(cat("note: ", input.string(), " holds no tokenizer files; none came along"));
  } else {
    note(cat("copied along: ", join(report.copied, ", ")));
  }
  return {};
}

}  // namespace

void add_convert(Command& program) {
  static ConvertCommand command;
  Command convert = program.subcommand(
      "convert", "Published model folders in and out",
      "Reads a model folder and writes it anew: as this program's own, or as transformers loads "
      "it. Reads our own folders and those of Llama, TransNormerLLM, MiniMax (transformers) and "
      "MiniMax-Text-01, with safetensors or with .bin pickles (these need python3 on the PATH; "
      "only weights are read out of them, nothing in them can run). Works tensor by tensor: a "
      "model larger than memory is no obstacle. OUT appears when all is done, or not at all.");
  convert.positional("IN", command.from, true, "model folder, or a run folder that holds one");
  convert.positional("OUT", command.out, true, "folder to make");
  std::vector<std::string> dialects = {"everlong", "hf"};
  for (const auto& family : published_families()) dialects.push_back(family);
  convert.choice("--to DIALECT", command.to, dialects,
                 "everlong: this program's own; hf: the published family that can hold the model; "
                 "or that family by name");
  convert.choice("--dtype TYPE", command.dtype, {"keep", "fp32", "bf16", "fp16"},
                 "of the weights written; keep: each as it is");
  convert.option("--max-shard-size SIZE", command.max_shard_size,
                 "weights beyond this go into several files: 5GB, 800MB, 2GiB");
  convert.flag("--infini", command.infini,
               "softmax layers become Infini-attention layers: the same numbers for texts of up to "
               "one segment, a memory of everything before beyond it. Train the gates afterwards");
  convert.option("--segment N", command.segment, "tokens of a segment (with --infini)");
  convert.choice("--update RULE", command.update, {"linear", "delta"},
                 "how the memory is written (with --infini)");
  convert.option("--gate-init X", command.gate_init,
                 "where the gates start: memory weighs sigmoid(X); default -3 (with --infini)");
  convert.flag("--json", command.json, "print one JSON object");
  convert.example("everlong convert models/Llama-3 models/llama",
                  "then: everlong info --model models/llama");
  convert.example("everlong convert runs/first models/first-hf --to hf --dtype bf16",
                  "then, in Python: AutoModelForCausalLM.from_pretrained(\"models/first-hf\")");
  convert.example("everlong convert TransNormerLLM-1B models/tnl --dtype bf16",
                  "a folder of .bin pickles");
  convert.example("everlong convert models/llama models/llama-infini --infini --segment 2048",
                  "then: everlong train a run file with from_model = \"models/llama-infini\"");
  convert.note(
      "Folders of safetensors need no conversion: every --model takes a published folder as it "
      "is.");
  convert.run([] { return command.run(); });
}

}  // namespace everlong::cli
