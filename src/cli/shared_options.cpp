#include "cli/shared_options.h"

#include <everlong_build_info.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/terminal.h"
#include "mechanisms/mechanism.h"
#include "ops/runtime.h"

namespace everlong::cli {
namespace {

// "softmax:landmark": layers of the one are built as the other, their settings go along. The
// weights must be named alike, which loading checks.
Status rename_layers(ModelConfig& config, const std::string& names) {
  const auto colon = names.find(':');
  const std::string from = names.substr(0, colon);
  const std::string to = colon == std::string::npos ? "" : names.substr(colon + 1);
  EVERLONG_RETURN_IF_ERROR(find_mechanism(to).status());
  if (std::ranges::find(config.layer_types, from) == config.layer_types.end())
    return invalid_argument("no layer of this model is \"", from,
                            "\"; its layers are: ", join(config.layer_types, ", "));
  if (std::ranges::find(config.layer_types, to) != config.layer_types.end())
    return invalid_argument("this model has layers of \"", to,
                            "\" already, with settings of their ", "own");
  const auto found = config.mechanisms.find(from);
  if (from == "softmax" && found != config.mechanisms.end() && found->second.value("window", 0) > 0)
    return unsupported(
        "these softmax layers see a window of tokens; only layers that see all of the ",
        "past can be read as another mechanism");
  std::ranges::replace(config.layer_types, from, to);
  if (auto settings = config.mechanisms.extract(from); !settings.empty()) {
    settings.key() = to;
    config.mechanisms.insert(std::move(settings));
  }
  return {};
}

// Lays "mechanism.key=value" over the config; values are JSON, or else plain text.
Status change(ModelConfig& config, const std::vector<std::string>& settings) {
  for (const std::string& text : settings) {
    const auto equals = text.find('='), dot = text.find('.');
    if (text.starts_with("layer_types=")) {
      EVERLONG_RETURN_IF_ERROR(
          rename_layers(config, text.substr(equals + 1)).at(cat("--set ", text)));
      continue;
    }
    if (equals == std::string::npos || dot == std::string::npos || dot > equals)
      return invalid_argument("--set ", text,
                              ": MECHANISM.KEY=VALUE is needed, as in landmark.top_k=4, or ",
                              "layer_types=FROM:TO, as in layer_types=softmax:landmark");
    const std::string mechanism = text.substr(0, dot), value = text.substr(equals + 1);
    if (std::ranges::find(config.layer_types, mechanism) == config.layer_types.end())
      return invalid_argument("--set ", text, ": no layer of this model is \"", mechanism,
                              "\"; its layers are: ", join(config.layer_types, ", "));
    auto parsed = nlohmann::json::parse(value, nullptr, /*allow_exceptions=*/false);
    config.mechanisms[mechanism][text.substr(dot + 1, equals - dot - 1)] =
        parsed.is_discarded() ? nlohmann::json(value) : std::move(parsed);
  }
  return {};
}

}  // namespace

void PlaceOptions::add(Command& command) {
  command.option("--device DEVICE", device,
                 "cpu, cuda, cuda:1, or auto: the first GPU that works, else the CPU");
  command.choice("--dtype", dtype, {"auto", "fp32", "bf16", "fp64"},
                 "of weights and activations; auto: bf16 on CUDA, else fp32");
  command.option("--threads N", threads, "on the CPU; 0: all cores");
}

Result<Place> PlaceOptions::resolve() const {
  EVERLONG_RETURN_IF_ERROR(set_threads(threads));
  EVERLONG_ASSIGN(const auto where, pick_device(device));
  EVERLONG_ASSIGN(const auto type, pick_dtype(dtype, where));
  return Place{where, type};
}

fs::path model_folder(const fs::path& given) {
  std::error_code ignored;
  const bool run = !fs::exists(given / "config.json", ignored) &&
                   fs::exists(given / "model" / "config.json", ignored);
  return run ? given / "model" : given;
}

void ModelOptions::add(Command& command) {
  command.required_option("-m,--model DIR", folder, "model folder, or a run folder that holds one");
  command.option("--set MECHANISM.KEY=VALUE", settings,
                 "change a mechanism's setting of config.json for this run; repeatable. "
                 "layer_types=FROM:TO reads layers of one mechanism as another with the same "
                 "weights, as in layer_types=softmax:landmark");
  place.add(command);
}

Result<LoadedModel> ModelOptions::load() const {
  LoadedModel loaded;
  EVERLONG_ASSIGN(loaded.place, place.resolve());
  loaded.folder = model_folder(folder);
  EVERLONG_ASSIGN(loaded.model,
                  load_model(loaded.folder, loaded.place.device, loaded.place.dtype,
                             [&](ModelConfig& config) { return change(config, settings); }));
  loaded.model->eval();
  EVERLONG_ASSIGN(loaded.tokenizer,
                  make_tokenizer(loaded.model->config().tokenizer, loaded.folder));
  return loaded;
}

void TextOptions::add(Command& command) {
  command.option("--data DIR", data, "dataset folder of `everlong data prepare`");
  command.choice("--split", split, {"train", "valid"}, "which part of the dataset");
  command.option("--text FILE", text, "a text file instead of a dataset");
}

Result<TokenSource> TextOptions::open(const LoadedModel& loaded) const {
  if (data.empty() == text.empty())
    return invalid_argument(
        data.empty() ? "nothing to read: give --data DIR (a prepared dataset) or --text FILE"
                     : "--data and --text are both given; one of them is read");
  if (!text.empty()) return TokenSource::from_text(text, *loaded.tokenizer);
  EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(data));
  const auto& config = loaded.model->config();
  const std::string_view reads = loaded.tokenizer->name();
  if (dataset.info().tokenizer != reads || dataset.info().vocab_size > config.vocab_size)
    return invalid_argument(data, " holds tokens of \"", dataset.info().tokenizer,
                            "\" (vocabulary ", dataset.info().vocab_size, "); the model reads \"",
                            reads, "\" (", config.vocab_size,
                            "). Prepare the text again with --tokenizer ",
                            reads.starts_with("tokenizer.") ? loaded.folder.string() : reads);
  EVERLONG_ASSIGN(auto view, dataset.split(split));
  return TokenSource(std::move(view));
}

void OutputOptions::add(Command& command) {
  command.flag("--json", json, "print one JSON object");
  command.option("--save FILE", save,
                 "write the JSON object to a file as well; `everlong report` reads it");
}

Status OutputOptions::give(const nlohmann::ordered_json& object, std::string_view text) const {
  if (json)
    print_json(object);
  else
    print(text);
  if (save.empty()) return {};
  return write_file(save,
                    object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

nlohmann::ordered_json describe(const Place& place) {
  return {{"device", place.device.is_cuda() ? "cuda" : "cpu"},
          {"dtype", dtype_name(place.dtype)},
          {"threads", threads()},
          {"machine", machine_name(place.device)},
          {"commit", build_info::kCommit}};
}

}  // namespace everlong::cli
