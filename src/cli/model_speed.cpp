#include "cli/model_speed.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>
#include <random>

#include "ops/runtime.h"
#include "session/stream.h"
#include "train/adamw.h"
#include "train/backprop.h"
#include "train/run_file.h"

namespace everlong::cli {
namespace {

constexpr std::int64_t kWrittenTokens = 32;  // of one timing of writing

std::vector<std::int32_t> random_tokens(std::int64_t count, std::int64_t vocabulary) {
  std::mt19937_64 generator(1);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (auto& id : ids)
    id = static_cast<std::int32_t>(generator() % static_cast<std::uint64_t>(vocabulary));
  return ids;
}

Batch random_batch(std::int64_t rows, std::int64_t tokens, std::int64_t vocabulary) {
  Batch batch;
  batch.rows = rows;
  batch.tokens = tokens;
  batch.inputs = batch.targets = random_tokens(rows * tokens, vocabulary);
  for (std::int64_t row = 0; row < rows; ++row) batch.document_starts.push_back(row * tokens);
  batch.row_continues.assign(static_cast<std::size_t>(rows), 0);
  return batch;
}

Spread rates(const Spread& seconds, std::int64_t tokens) {
  const auto count = static_cast<double>(tokens);
  return {count / seconds.median, count / seconds.max, count / seconds.min, seconds.repeats};
}

void bench_training(Decoder& model, const Place& place, const ModelBenchOptions& options,
                    ModelSpeed& speed) {
  model.train();
  model.set_checkpointing(options.checkpointing);
  std::vector<std::pair<std::string, at::Tensor>> parameters;
  for (const auto& entry : model.named_parameters())
    parameters.emplace_back(entry.key(), entry.value());
  AdamW optimizer(parameters, {});
  Backprop backprop(model, place.device, Carry::kNone, /*segment_tokens=*/0);
  const Batch batch = random_batch(options.rows, speed.tokens, model.config().vocab_size);
  const std::int64_t tokens = options.rows * speed.tokens;
  reset_device_peak(place.device);
  const auto step = [&] {
    backprop.run(batch, 1.0 / static_cast<double>(tokens), [&] { optimizer.take_gradients(); });
    optimizer.clip_gradients(1.0);
    optimizer.step(1e-6);
    synchronize(place.device);
  };
  speed.training = rates(
      measure_in_turns({step}, {.min_seconds = 1, .min_repeats = 3, .enough_seconds = 20}).front(),
      tokens);
  const auto memory = device_memory(place.device);
  speed.training_peak_bytes = memory ? memory->peak : peak_resident_bytes();
}

Status bench_streaming(const std::shared_ptr<Decoder>& model, const ModelBenchOptions& options,
                       ModelSpeed& speed) {
  model->eval();
  const auto ids = random_tokens(speed.tokens, model->config().vocab_size);
  Stream stream(model, options.feed);
  Status status;
  const auto read = [&] {
    stream.reset();
    if (status.ok())
      status = stream.feed(ids);  // ends with the logits on the CPU: the device is idle
  };
  const auto reading =
      measure_in_turns({read}, {.min_seconds = 0.5, .min_repeats = 3, .enough_seconds = 10})
          .front();
  EVERLONG_RETURN_IF_ERROR(status);
  speed.reading = rates(reading, speed.tokens);
  speed.state_bytes = stream.state_bytes();
  const auto write = [&] {
    for (std::int64_t i = 0; i < kWrittenTokens && status.ok(); ++i)
      status = stream.feed({ids.data(), 1});
  };
  speed.writing = rates(measure_in_turns({write}).front(), kWrittenTokens);
  return status;
}

}  // namespace

Result<ModelSpeed> bench_model(const ModelConfig& config, const Place& place, std::int64_t tokens,
                               const ModelBenchOptions& options) {
  if (tokens < 2 || options.rows < 1 || options.feed < 1)
    return invalid_argument("lengths start at 2 tokens, --rows and --feed at 1");
  at::manual_seed(1);
  EVERLONG_ASSIGN(const auto model, Decoder::make(config));
  model->to(place.device, place.dtype);
  ModelSpeed speed;
  speed.tokens = tokens;
  try {
    if (!options.no_training) bench_training(*model, place, options, speed);
  } catch (const c10::OutOfMemoryError&) {
    speed.trouble = "out of memory";
  }
  EVERLONG_RETURN_IF_ERROR(bench_streaming(model, options, speed));
  return speed;
}

nlohmann::ordered_json to_json(const ModelSpeed& speed) {
  nlohmann::ordered_json object = {{"tokens", speed.tokens}};
  const auto add = [&](const std::string& name, const Spread& rate) {
    if (rate.repeats == 0) return;
    object[name] = rate.median;
    object[name + "_min"] = rate.min;
    object[name + "_max"] = rate.max;
  };
  add("training_tokens_per_second", speed.training);
  if (!speed.trouble.empty()) object["trouble"] = speed.trouble;
  object["training_peak_bytes"] = speed.training_peak_bytes;
  add("reading_tokens_per_second", speed.reading);
  add("writing_tokens_per_second", speed.writing);
  object["state_bytes"] = speed.state_bytes;
  return object;
}

Result<ModelConfig> read_any_config(const fs::path& source) {
  if (source.extension() == ".toml") {
    EVERLONG_ASSIGN(const auto run, RunFile::read(source, {}));
    return run.model;
  }
  if (source.extension() == ".json") return ModelConfig::read(source);
  return ModelConfig::read(model_folder(source) / "config.json");
}

}  // namespace everlong::cli
