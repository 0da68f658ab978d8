#include "models/checkpoint.h"

#include <ATen/ATen.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstdio>

#include "core/settings.h"
#include "mechanisms/mechanism.h"
#include "models/weight_reader.h"

namespace everlong {
namespace {

constexpr const char* kConfig = "config.json";
constexpr const char* kGeneration = "generation_config.json";

std::string shape_text(at::IntArrayRef shape) { return nlohmann::json(shape.vec()).dump(); }

// The config without what only says how the model runs.
nlohmann::json lasting_config(const Decoder& model) {
  nlohmann::json config = model.config().to_json();
  for (const Mechanism* mechanism : mechanisms()) {
    const auto settings = config.find(mechanism->name);
    if (settings == config.end()) continue;
    std::size_t erased = 0;
    for (const std::string& key : mechanism->running_settings) erased += settings->erase(key);
    if (erased > 0 && settings->empty()) config.erase(settings);  // as if nothing had been set
  }
  return config;
}

// What the config.json of a published folder leaves open: transformers' own defaults.
constexpr int kPublishedTopK = 50;

// The object in a JSON file.
Result<nlohmann::json> read_object(const fs::path& path) {
  EVERLONG_ASSIGN(const std::string text, read_file(path));
  auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return corrupt(path.string(), ": is not a valid JSON object");
  return object;
}

}  // namespace

Result<FolderConfig> read_config(const fs::path& folder) {
  const fs::path path = folder / kConfig;
  std::error_code ignored;
  if (!fs::exists(path, ignored))
    return not_found(folder.string(), ": no model here (no config.json); give the folder of a ",
                     "model, as `everlong train` and `everlong convert` make it");
  EVERLONG_ASSIGN(const auto object, read_object(path));
  const bool published = is_published(object);
  EVERLONG_ASSIGN(auto config, published ? config_from_published(object, path.string())
                                         : ModelConfig::from_json(object, path.string()));
  return FolderConfig{std::move(config), published, object};
}

Result<std::shared_ptr<Decoder>> load_model(const fs::path& folder, at::Device device,
                                            at::ScalarType dtype, const ConfigEdit& edit) {
  if (!at::isFloatingType(dtype))
    return invalid_argument("weights cannot be ", at::toString(dtype));
  EVERLONG_ASSIGN(FolderConfig about, read_config(folder));
  if (edit) EVERLONG_RETURN_IF_ERROR(edit(about.config));
  if (!has_safetensors(folder) && has_pickles(folder))
    return unsupported(folder.string(),
                       ": holds its weights as pickles, which are not loaded; run ",
                       "`everlong convert ", folder.string(), " NEW_FOLDER` once");
  EVERLONG_ASSIGN(auto source, open_safetensors(folder));
  auto made = Decoder::make(about.config, WeightInit::kUnfilled);
  if (!made.ok()) return made.status().at((folder / kConfig).string());
  const std::shared_ptr<Decoder> model = *std::move(made);
  EVERLONG_ASSIGN(const auto reader,
                  WeightReader::open(std::move(source), *model, about.published));
  const at::NoGradGuard off;
  for (auto [name, parameter] : parameters_of(*model)) {
    EVERLONG_ASSIGN(const at::Tensor read, reader.read(name, device, dtype));
    parameter.set_data(read);
  }
  // Buffers and whatever else a layer moves; their dtypes are the layer's business.
  model->to(device);
  return model;
}

nlohmann::json generation_config(const SamplingParams& params) {
  return {{"temperature", params.temperature},
          {"top_k", params.top_k},
          {"top_p", params.top_p},
          {"min_p", params.min_p},
          {"repetition_penalty", params.repetition_penalty},
          {"penalty_window", params.penalty_window}};
}

Status save_model(const fs::path& folder, const Decoder& model,
                  const std::map<std::string, std::string>& metadata,
                  std::int64_t max_shard_bytes) {
  EVERLONG_RETURN_IF_ERROR(make_directories(folder));
  const std::string config = model.config().to_json().dump(2) + "\n";
  const auto parameters = parameters_of(model);
  std::vector<TensorPlan> plan;
  for (const auto& item : model.named_parameters()) {
    EVERLONG_ASSIGN(const DType dtype, to_dtype(item.value().scalar_type()));
    plan.push_back({item.key(), dtype, item.value().sizes().vec()});
  }
  at::Tensor plain;  // the one tensor that is in memory besides the model
  EVERLONG_RETURN_IF_ERROR(write_safetensors_folder(
      folder, plan, metadata, max_shard_bytes,
      [&](const std::string& name) -> Result<std::span<const std::byte>> {
        plain = parameters.at(name).detach().cpu().contiguous();
        return std::span(static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes());
      },
      [&]() -> Status {
        // Weights of one model must never lie beside the config of another: where the two change
        // together, the folder is no model for a moment.
        std::error_code ignored;
        const auto old = read_file(folder / kConfig);
        if (!old.ok() || *old != config) fs::remove(folder / kConfig, ignored);
        return {};
      }));
  EVERLONG_RETURN_IF_ERROR(write_file(folder / kConfig, config));
  if (fs::exists(folder / kGeneration)) return {};
  return write_file(folder / kGeneration, generation_config({}).dump(2) + "\n");
}

Result<SamplingParams> read_generation_config(const fs::path& folder) {
  const fs::path path = folder / kGeneration;
  std::error_code ignored;
  const auto config = read_object(folder / kConfig);
  const bool published = config.ok() && is_published(*config);
  SamplingParams params;
  if (!fs::exists(path, ignored)) return params;
  EVERLONG_ASSIGN(const auto object, read_object(path));
  // Other programs' files have many more keys, and other defaults.
  nlohmann::json known = object;
  if (published) {
    const nlohmann::json ours = generation_config(params);
    known = {{"do_sample", false}, {"top_k", kPublishedTopK}};
    for (const auto& [key, value] : object.items())
      if ((ours.contains(key) || key == "do_sample") && !value.is_null()) known[key] = value;
  }
  Settings s(known, path.string());
  params.temperature = s.number("temperature", params.temperature, 0, 1e6);
  params.top_k = s.integer("top_k", params.top_k, 0, INT32_MAX);
  params.top_p = s.number("top_p", params.top_p, 0, 1);
  params.min_p = s.number("min_p", params.min_p, 0, 1);
  params.repetition_penalty = s.number("repetition_penalty", params.repetition_penalty, 1e-3, 1e3);
  params.penalty_window =
      s.integer("penalty_window", params.penalty_window, 0, std::int64_t{1} << 24);
  // What other programs write into this file.
  if (!s.boolean("do_sample", true)) params.temperature = 0;
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"})
    s.raw(key);
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(params).at(path.string()));
  return params;
}

std::string fingerprint(const Decoder& model) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const auto add = [&](const void* data, std::size_t bytes) {
    XXH3_64bits_update(&state, data, bytes);
  };
  const std::string config = lasting_config(model).dump();
  add(config.data(), config.size());
  for (const auto& [name, parameter] : parameters_of(model)) {
    const at::Tensor plain = parameter.detach().cpu().contiguous();
    const std::string about =
        cat("\n", name, " ", at::toString(plain.scalar_type()), " ", shape_text(plain.sizes()));
    add(about.data(), about.size());
    add(plain.const_data_ptr(), plain.nbytes());
  }
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits_digest(&state)));
  return digits;
}

}  // namespace everlong
