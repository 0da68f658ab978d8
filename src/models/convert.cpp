#include "models/convert.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <system_error>

#include "models/convert_infini.h"
#include "models/weight_reader.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr const char* kTokenIds[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
// Of a published config.json: no number of the forward pass, but other programs look at them.
constexpr const char* kKeptKeys[] = {"max_position_embeddings", "block_size"};
// What a tokenizer consists of, by the names that are in use.
constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                           "tokenizer.model",
                                           "tokenizer_config.json",
                                           "special_tokens_map.json",
                                           "added_tokens.json",
                                           "vocab.json",
                                           "merges.txt",
                                           "vocab.txt",
                                           "chat_template.jinja",
                                           "chat_template.json"};

// tokenization_*.py, which some tokenizers need; LICENSE and NOTICE, which go where weights go.
bool travels(const std::string& name) {
  return std::ranges::find(kTokenizerFiles, name) != std::end(kTokenizerFiles) ||
         (name.starts_with("tokenization_") && name.ends_with(".py")) ||
         name.starts_with("LICENSE") || name.starts_with("NOTICE");
}

Result<std::vector<std::string>> copy_along(const fs::path& from, const fs::path& to) {
  std::vector<std::string> copied;
  std::error_code error;
  for (fs::directory_iterator entry(from, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!entry->is_regular_file() || !travels(name)) continue;
    fs::copy_file(entry->path(), to / name, error);
    if (error) break;
    copied.push_back(name);
  }
  if (error) return io_error(from.string(), ": cannot be copied from: ", error.message());
  std::ranges::sort(copied);
  return copied;
}

json read_optional(const fs::path& path) {
  const auto text = read_file(path);
  json object = text.ok() ? json::parse(*text, nullptr, /*allow_exceptions=*/false) : json();
  return object.is_object() ? object : json::object();
}

// Begin, end, padding: from generation_config.json, else config.json, else what our bytes mean. All
// three are always said, as programs fill in ids of their own (transformers: 1 and 2 for Llama).
json token_ids(const fs::path& folder, const FolderConfig& about) {
  json ids = json::object();
  const json generation = read_optional(folder / "generation_config.json");
  const bool bytes = about.config.tokenizer == "bytes" && about.config.vocab_size >= 259;
  const json of_bytes = {{"bos_token_id", 257}, {"eos_token_id", 256}, {"pad_token_id", 258}};
  for (const char* key : kTokenIds) {
    if (generation.contains(key))
      ids[key] = generation[key];
    else if (about.object.contains(key))
      ids[key] = about.object[key];
    else
      ids[key] = bytes ? of_bytes[key] : json();
  }
  return ids;
}

// As transformers reads it: a temperature only where tokens are drawn.
json published_generation(const SamplingParams& params) {
  if (params.temperature == 0) return {{"do_sample", false}};
  json object = {{"do_sample", true}};
  const SamplingParams none;
  object["temperature"] = params.temperature;
  object["top_k"] = params.top_k;  // absent would mean 50
  object["top_p"] = params.top_p;
  if (params.min_p != none.min_p) object["min_p"] = params.min_p;
  if (params.repetition_penalty != none.repetition_penalty)
    object["repetition_penalty"] = params.repetition_penalty;
  return object;
}

const char* torch_name(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kDouble:
      return "float64";
    default:
      return "float32";
  }
}

struct Dialect {
  std::string name;
  json config, generation;
};

// The two files that say what the weights are.
Result<Dialect> choose(const fs::path& from, const FolderConfig& about,
                       const ConvertOptions& options, at::ScalarType embedding) {
  const json ids = token_ids(from, about);
  EVERLONG_ASSIGN(const SamplingParams sampling, read_generation_config(from));
  Dialect dialect;
  if (options.to == "everlong") {
    dialect = {options.to, about.config.to_json(), generation_config(sampling)};
  } else {
    dialect.name = options.to;
    if (options.to == "hf") {
      EVERLONG_ASSIGN(dialect.name, family_of(about.config));
    }
    EVERLONG_ASSIGN(dialect.config, published_config(about.config, dialect.name));
    dialect.config["torch_dtype"] = torch_name(options.dtype.value_or(embedding));
    dialect.config.update(ids);
    for (const char* key : kKeptKeys)
      if (about.published && about.object.contains(key)) dialect.config[key] = about.object[key];
    dialect.generation = about.published ? read_optional(from / "generation_config.json")
                                         : published_generation(sampling);
  }
  for (const auto& [key, id] : ids.items())
    if (!id.is_null()) dialect.generation[key] = id;
  return dialect;
}

Result<std::unique_ptr<TensorSource>> open_weights(const fs::path& folder) {
  return !has_safetensors(folder) && has_pickles(folder) ? open_pickles(folder)
                                                         : open_safetensors(folder);
}

}  // namespace

Result<ConvertReport> convert_model(const fs::path& from, const fs::path& to,
                                    const ConvertOptions& options) {
  if (options.dtype && !at::isFloatingType(*options.dtype))
    return invalid_argument("weights cannot be ", at::toString(*options.dtype));
  EVERLONG_ASSIGN(const FolderConfig about, read_config(from));
  const auto model = Decoder::make(about.config, WeightInit::kMeta);
  if (!model.ok()) return model.status().at((from / "config.json").string());
  // What is written: the same model, or with its gates, which the source does not have.
  FolderConfig target = about;
  auto written_model = *model;
  if (options.infini) {
    if (options.to != "everlong")
      return invalid_argument("no published family has Infini-attention layers; write \"everlong\"",
                              ", not \"", options.to, "\"");
    EVERLONG_ASSIGN(target.config, with_infini_layers(about.config, *options.infini));
    EVERLONG_ASSIGN(written_model, Decoder::make(target.config, WeightInit::kMeta));
  }
  const TensorMap source_parameters = parameters_of(**model);
  EVERLONG_ASSIGN(auto source, open_weights(from));
  auto metadata = source->metadata();
  metadata["format"] = "pt";  // transformers reads no file without it
  EVERLONG_ASSIGN(const auto reader,
                  WeightReader::open(std::move(source), **model, about.published));

  ConvertReport report;
  std::vector<TensorPlan> plan;
  at::ScalarType embedding = at::kFloat;
  for (const auto& item : written_model->named_parameters()) {
    const at::ScalarType stored = source_parameters.contains(item.key())
                                      ? to_scalar_type(reader.dtype(item.key()))
                                      : at::kFloat;
    if (item.key() == "model.embed_tokens.weight") embedding = stored;
    EVERLONG_ASSIGN(const DType dtype, to_dtype(options.dtype.value_or(stored)));
    plan.push_back({item.key(), dtype, item.value().sizes().vec()});
    EVERLONG_ASSIGN(const std::uint64_t bytes, tensor_bytes(dtype, plan.back().shape));
    report.bytes += static_cast<std::int64_t>(bytes);
  }
  EVERLONG_ASSIGN(const Dialect dialect, choose(from, target, options, embedding));
  report.dialect = dialect.name;
  report.parameters = written_model->parameter_count();
  report.tensors = static_cast<std::int64_t>(plan.size());

  std::int64_t done = 0;
  at::Tensor plain;  // the one tensor in memory
  const TensorBytes next = [&](const std::string& name) -> Result<std::span<const std::byte>> {
    done += static_cast<std::int64_t>(plain.defined() ? plain.nbytes() : 0);
    if (options.progress) EVERLONG_RETURN_IF_ERROR(options.progress(done, report.bytes));
    plain = at::Tensor();  // before the next one comes
    if (!source_parameters.contains(name)) {
      const double start = target.config.mechanisms.at("infini").at("gate_init").get<double>();
      const at::Tensor gate = written_model->named_parameters()[name];
      plain = at::full(gate.sizes(), start, options.dtype.value_or(at::kFloat));
      return std::span(static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes());
    }
    EVERLONG_ASSIGN(plain, reader.read(name, at::kCPU,
                                       options.dtype.value_or(to_scalar_type(reader.dtype(name)))));
    return std::span(static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes());
  };
  EVERLONG_RETURN_IF_ERROR(
      write_safetensors_folder(to, plan, metadata, options.max_shard_bytes, next));
  if (options.progress) EVERLONG_RETURN_IF_ERROR(options.progress(report.bytes, report.bytes));
  EVERLONG_ASSIGN(report.copied, copy_along(from, to));
  EVERLONG_RETURN_IF_ERROR(
      write_file(to / "generation_config.json", dialect.generation.dump(2) + "\n"));
  EVERLONG_RETURN_IF_ERROR(write_file(to / "config.json", dialect.config.dump(2) + "\n"));
  EVERLONG_ASSIGN(const auto written, SafetensorsFolder::open(to));
  report.files = static_cast<std::int64_t>(written.files().size());
  return report;
}

}  // namespace everlong
