#include "train/trainer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "data/tokenizer.h"
#include "layers/write_weighted.h"
#include "models/checkpoint.h"
#include "ops/runtime.h"
#include "train/checkpoint_file.h"
#include "train/divergence.h"

namespace everlong {
namespace {

// Validation runs in pieces of at least this many tokens: short rows would leave the matrix
// products too small.
constexpr std::int64_t kEvaluationPiece = 2048;

Schedule make_schedule(const TrainSettings& train) {
  return {.kind = schedule_kind(train.schedule),
          .learning_rate = train.learning_rate,
          .steps = train.steps,
          .warmup_steps = train.warmup_steps,
          .decay_fraction = train.decay_fraction,
          .min_lr_ratio = train.min_lr_ratio,
          .max_seconds = train.max_seconds};
}

// Data that say how often memories store each token need layers that can do so, all of them.
Status check_takes_writes(const SplitView& split, const Decoder& model, const std::string& path) {
  if (!split.has_writes()) return {};
  for (std::int64_t i = 0; i < model.config().num_layers(); ++i)
    if (dynamic_cast<const WriteWeighted*>(&model.mixer(i)) == nullptr)
      return unsupported(path,
                         " says how often a memory stores each token (--write-multiplicity), ",
                         "which layer ", i, ", mechanism \"",
                         model.config().layer_types[static_cast<std::size_t>(i)],
                         "\", cannot take; use layers that can (infini), or make the data without");
  return {};
}

}  // namespace

Status Trainer::build_model(const TokenDataset& dataset, const TensorFile* snapshot) {
  const auto& train = run_.train;
  if (snapshot != nullptr) {
    // The folder of train.from_model may be gone by now, and its weights are not needed.
    EVERLONG_ASSIGN(const auto text, metadata_entry(*snapshot, "config"));
    const auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    EVERLONG_ASSIGN(const auto config, ModelConfig::from_json(object, "metadata config"));
    EVERLONG_ASSIGN(model_, Decoder::make(config));
  } else if (train.from_model.empty()) {
    EVERLONG_ASSIGN(model_, Decoder::make(run_.model));
  } else {
    EVERLONG_ASSIGN(model_, load_model(train.from_model, at::kCPU, at::kFloat));
  }
  const auto& info = dataset.info();
  const auto& config = model_->config();
  std::string reads = config.tokenizer;
  if (reads == "published") {
    EVERLONG_ASSIGN(const auto tokenizer, make_tokenizer(reads, train.from_model));
    reads = tokenizer->name();
  }
  if (info.tokenizer != reads || info.vocab_size > config.vocab_size)
    return invalid_argument(
        run_.data.path, " holds tokens of \"", info.tokenizer, "\" (vocabulary ", info.vocab_size,
        "); the model is made for \"", reads, "\" (", config.vocab_size,
        "): prepare the text again, or set model.tokenizer and model.vocab_size");
  model_->to(device_, dtype_);
  model_->train();
  model_->set_checkpointing(train.checkpointing);
  return {};
}

Result<std::unique_ptr<Trainer>> Trainer::make(const RunFile& run, const TensorFile* snapshot) {
  EVERLONG_RETURN_IF_ERROR(set_threads(run.train.threads));
  EVERLONG_ASSIGN(const auto device, pick_device(run.train.device));
  EVERLONG_ASSIGN(const auto dtype, pick_dtype(run.train.dtype, device));
  EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(run.data.path));
  EVERLONG_ASSIGN(auto split, dataset.split("train"));

  std::unique_ptr<Trainer> trainer(new Trainer(run, device, dtype));
  const auto seed = static_cast<std::uint64_t>(run.train.seed);
  at::manual_seed(seed);
  EVERLONG_RETURN_IF_ERROR(trainer->build_model(dataset, snapshot));
  EVERLONG_RETURN_IF_ERROR(check_takes_writes(split, *trainer->model_, run.data.path));
  EVERLONG_ASSIGN(const auto packing, packing_from_name(run.data.packing));
  EVERLONG_ASSIGN(auto reader, BatchReader::create(split, {.rows = run.data.rows,
                                                           .row_tokens = run.data.row_tokens,
                                                           .packing = packing,
                                                           .seed = seed}));
  trainer->reader_ = std::make_unique<BatchReader>(std::move(reader));
  if (auto valid = dataset.split("valid"); valid.ok() && valid->tokens() > 0)
    trainer->valid_ = std::make_unique<SplitView>(*std::move(valid));
  trainer->schedule_ = make_schedule(run.train);
  trainer->batches_.resize(static_cast<std::size_t>(run.train.accumulation));

  std::vector<std::pair<std::string, at::Tensor>> parameters;
  for (const auto& entry : trainer->model_->named_parameters())
    parameters.emplace_back(entry.key(), entry.value());
  AdamWOptions adamw{run.train.beta1, run.train.beta2, run.train.eps, run.train.weight_decay};
  if (run.train.gate_learning_rate > 0 && run.train.learning_rate > 0)
    for (const char* gate : {".self_attn.gate", ".token_mixer.gate", ".attn.gate"})
      adamw.rate_factors.emplace_back(gate, run.train.gate_learning_rate / run.train.learning_rate);
  trainer->optimizer_ = std::make_unique<AdamW>(parameters, adamw);
  trainer->backprop_ = std::make_unique<Backprop>(
      *trainer->model_, device, carry_from_name(run.train.carry), run.train.segment_tokens);
  EVERLONG_ASSIGN(const auto about_data, read_file(fs::path(run.data.path) / kDatasetFile));
  trainer->data_hash_ = short_hash(about_data);
  if (snapshot != nullptr) EVERLONG_RETURN_IF_ERROR(trainer->restore(*snapshot));
  return trainer;
}

Result<StepReport> Trainer::step(double seconds) {
  StepReport report{.step = steps_done_ + 1, .lr = schedule_.rate(steps_done_, seconds)};
  double weight = 0;
  for (auto& batch : batches_) {
    EVERLONG_RETURN_IF_ERROR(reader_->next(batch));
    weight += batch.weight();
    report.tokens += batch.rows * batch.tokens;
  }
  // The mean over the step's predictions, however they spread over its batches.
  const double scale = weight > 0 ? 1 / weight : 0;
  at::Tensor nll;
  for (const auto& batch : batches_) {
    const at::Tensor sum = backprop_->run(batch, scale, [&] { optimizer_->take_gradients(); });
    nll = nll.defined() ? nll + sum : sum;
  }
  const at::Tensor norm = optimizer_->clip_gradients(run_.train.clip);
  const at::Tensor figures =
      at::stack({nll * scale, norm.to(at::kDouble)}).cpu();  // the step's one wait
  report.loss = figures[0].item<double>();
  report.grad_norm = figures[1].item<double>();
  if (!std::isfinite(report.loss) || !std::isfinite(report.grad_norm)) {
    return diverged(report);
  }
  optimizer_->step(report.lr);
  ++steps_done_;
  tokens_done_ += report.tokens;
  return report;
}

Result<Evaluation> Trainer::evaluate() {
  Evaluation evaluation;
  if (!valid_ || run_.train.eval_tokens == 0) return evaluation;
  model_->eval();
  Backprop scorer(*model_, device_, Carry::kDetached, /*segment_tokens=*/0);
  SequentialReader reader(*valid_, std::max(run_.data.row_tokens, kEvaluationPiece),
                          run_.train.eval_tokens);
  Batch batch;
  at::Tensor nll;
  double weight = 0;
  Status status;
  while (true) {
    const auto more = reader.next(batch);
    status = more.status();
    if (!more.ok() || !*more) break;
    const at::Tensor sum = scorer.score(batch);
    nll = nll.defined() ? nll + sum : sum;
    weight += batch.weight();
  }
  model_->train();
  EVERLONG_RETURN_IF_ERROR(status);
  if (weight == 0) return evaluation;
  const double total = nll.item<double>();
  evaluation.tokens = reader.position();
  evaluation.loss = total / weight;
  evaluation.of_text = !valid_->has_targets();
  if (!evaluation.of_text) return evaluation;
  const double bytes = static_cast<double>(valid_->bytes()) *
                       static_cast<double>(reader.position()) /
                       static_cast<double>(valid_->tokens());
  evaluation.bits_per_byte = total / std::numbers::ln2 / bytes;
  return evaluation;
}

Status Trainer::diverged(const StepReport& report) {
  const std::string where =
      where_it_began(*model_, *backprop_, device_, run_.train.segment_tokens, batches_,
                     optimizer_->gradients(), std::isfinite(report.loss));
  optimizer_->clear_gradients();
  std::string causes =
      "a learning rate that is too high (train.learning_rate), a warm-up that is "
      "too short (train.warmup_steps)";
  if (run_.train.clip <= 0 || run_.train.clip > 10)
    causes += cat(", gradients that are not clipped (train.clip = ", run_.train.clip, ")");
  if (dtype_ == at::kBFloat16) causes += ", too few digits (train.dtype = \"bf16\")";
  return invalid_argument("step ", report.step, ": loss = ", report.loss,
                          ", gradient norm = ", report.grad_norm, " at learning rate ", report.lr,
                          "; training has diverged. ", where, " Likely causes: ", causes);
}

Status Trainer::save(const fs::path& folder) const {
  EVERLONG_RETURN_IF_ERROR(save_model(
      folder, *model_,
      {{"step", std::to_string(steps_done_)}, {"tokens", std::to_string(tokens_done_)}}));
  return copy_tokenizer_files(run_.data.path, folder);
}

}  // namespace everlong
