#include "models/checkpoint.h"

#include <ATen/ATen.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstdio>

#include "core/settings.h"

namespace everlong {
namespace {

constexpr const char* kConfig = "config.json";
constexpr const char* kWeights = "model.safetensors";
constexpr const char* kGeneration = "generation_config.json";
constexpr const char* kHead = "lm_head.weight";
constexpr const char* kEmbedding = "model.embed_tokens.weight";

std::string shape_text(at::IntArrayRef shape) { return nlohmann::json(shape.vec()).dump(); }

TensorMap parameters_of(const Decoder& model) {
  TensorMap parameters;
  for (const auto& item : model.named_parameters()) parameters[item.key()] = item.value();
  return parameters;
}

// Published folders of models with one shared matrix hold it once or, as a copy, twice.
bool is_copy_of_embedding(const std::map<std::string, TensorEntry>& tensors) {
  const auto head = tensors.find(kHead), embedding = tensors.find(kEmbedding);
  return head != tensors.end() && embedding != tensors.end() &&
         head->second.dtype == embedding->second.dtype &&
         head->second.shape == embedding->second.shape &&
         std::ranges::equal(head->second.bytes, embedding->second.bytes);
}

// Names and shapes of the file against those of the model, before anything is copied.
Status check_tensors(const std::map<std::string, TensorEntry>& tensors, const TensorMap& parameters,
                     const ModelConfig& config) {
  for (const auto& [name, parameter] : parameters) {
    const auto found = tensors.find(name);
    if (found == tensors.end())
      return corrupt("tensor \"", name, "\" is missing; config.json asks for it");
    const TensorEntry& entry = found->second;
    if (at::IntArrayRef(entry.shape) != parameter.sizes())
      return corrupt("tensor \"", name, "\" has shape ", shape_text(entry.shape),
                     "; config.json asks for ", shape_text(parameter.sizes()));
    if (!at::isFloatingType(to_scalar_type(entry.dtype)))
      return corrupt("tensor \"", name, "\" is ", info(entry.dtype).name,
                     "; weights are floating-point numbers");
  }
  for (const auto& [name, entry] : tensors) {
    if (parameters.contains(name)) continue;
    if (config.tie_word_embeddings && name == kHead) {
      if (is_copy_of_embedding(tensors)) continue;
      return corrupt("tensor \"", name, "\" differs from ", kEmbedding,
                     ", but config.json says that they are one: set tie_word_embeddings to false");
    }
    return corrupt("tensor \"", name, "\" is no parameter of the model that config.json describes");
  }
  return {};
}

}  // namespace

Result<std::shared_ptr<Decoder>> load_model(const fs::path& folder, at::Device device,
                                            at::ScalarType dtype) {
  if (!at::isFloatingType(dtype))
    return invalid_argument("weights cannot be ", at::toString(dtype));
  EVERLONG_ASSIGN(const ModelConfig config, ModelConfig::read(folder / kConfig));
  auto made = Decoder::make(config);
  if (!made.ok()) return made.status().at((folder / kConfig).string());
  const std::shared_ptr<Decoder> model = *std::move(made);

  EVERLONG_ASSIGN(const auto file, SafetensorsFile::open(folder / kWeights));
  const TensorMap parameters = parameters_of(*model);
  EVERLONG_RETURN_IF_ERROR(
      check_tensors(file.tensors(), parameters, config).at(file.path().string()));
  model->to(
      device);  // buffers and whatever else a layer moves; their dtypes are the layer's business
  const at::NoGradGuard off;
  for (auto [name, parameter] : parameters)
    parameter.set_data(to_tensor(file.tensors().at(name)).to(device, dtype));
  return model;
}

Status save_model(const fs::path& folder, const Decoder& model,
                  const std::map<std::string, std::string>& metadata) {
  EVERLONG_RETURN_IF_ERROR(make_directories(folder));
  EVERLONG_RETURN_IF_ERROR(save_tensors(folder / kWeights, parameters_of(model), metadata));
  EVERLONG_RETURN_IF_ERROR(write_file(folder / kConfig, model.config().to_json().dump(2) + "\n"));
  if (fs::exists(folder / kGeneration)) return {};
  const SamplingParams defaults;
  const nlohmann::json generation = {{"temperature", defaults.temperature},
                                     {"top_k", defaults.top_k},
                                     {"top_p", defaults.top_p},
                                     {"min_p", defaults.min_p},
                                     {"repetition_penalty", defaults.repetition_penalty},
                                     {"penalty_window", defaults.penalty_window}};
  return write_file(folder / kGeneration, generation.dump(2) + "\n");
}

Result<SamplingParams> read_generation_config(const fs::path& folder) {
  const fs::path path = folder / kGeneration;
  if (!fs::exists(path)) return SamplingParams{};
  EVERLONG_ASSIGN(const std::string text, read_file(path));
  const auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return corrupt(path.string(), ": is not a valid JSON object");
  Settings s(object, path.string());
  SamplingParams params;
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
  const std::string config = model.config().to_json().dump();
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
