#include "cli/shared_options.h"

#include <everlong_build_info.h>

#include <nlohmann/json.hpp>

#include "cli/terminal.h"
#include "ops/runtime.h"

namespace everlong::cli {

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
  place.add(command);
}

Result<LoadedModel> ModelOptions::load() const {
  LoadedModel loaded;
  EVERLONG_ASSIGN(loaded.place, place.resolve());
  loaded.folder = model_folder(folder);
  EVERLONG_ASSIGN(loaded.model, load_model(loaded.folder, loaded.place.device, loaded.place.dtype));
  loaded.model->eval();
  EVERLONG_ASSIGN(loaded.tokenizer, make_tokenizer(loaded.model->config().tokenizer));
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
  if (dataset.info().tokenizer != config.tokenizer || dataset.info().vocab_size > config.vocab_size)
    return invalid_argument(data, " holds tokens of \"", dataset.info().tokenizer,
                            "\" (vocabulary ", dataset.info().vocab_size, "); the model reads \"",
                            config.tokenizer, "\" (", config.vocab_size,
                            "). Prepare the text again with --tokenizer ", config.tokenizer);
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
