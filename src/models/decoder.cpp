#include "models/decoder.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "layers/experts.h"
#include "layers/weights.h"
#include "mechanisms/mechanism.h"
#include "models/layer_trace.h"
#include "models/megalodon_block.h"
#include "models/module_group.h"
#include "models/recompute.h"
#include "models/torchscale_layer.h"

namespace everlong {
namespace {

// The names that the published checkpoints give to the parts of a block, and its norm and MLP.
struct Parts {
  const char *mixer, *mlp, *experts;
  const char *mixer_norm, *mlp_norm;  // of the modules that hold the norms' weights
  const char *norm, *gated_mlp;
  const char *root = "model", *embedding = "embed_tokens", *layers = "layers", *last_norm = "norm";
};
constexpr Parts kTransNormer = {"token_mixer",  "channel_mixer", nullptr, "token_norm",
                                "channel_norm", "srms",          "sglu"};
// With experts: as Mixtral and MiniMax-01.
constexpr Parts kLlama = {
    "self_attn", "mlp",   "block_sparse_moe", "input_layernorm", "post_attention_layernorm",
    "rms",       "swiglu"};

// As GPT-2 and the models of lm_benchmark.
constexpr Parts kGpt = {"attn", "mlp",         nullptr, "ln_1", "ln_2", "layer",
                        "gelu", "transformer", "wte",   "h",    "ln_f"};

const Parts& parts_of(const ModelConfig& config) {
  if (config.block == "gpt") return kGpt;
  return config.block == "llama" ? kLlama : kTransNormer;
}

// x += mixer(norm(x));  x += mlp(norm(x)).  TransNormerLLM (2307.14995) and Llama differ in the
// norm and the MLP. MiniMax-01 (2501.08313, published code) weighs both summands and continues from
// the normalised input: h = norm(x), x = alpha h + beta f(h).
class NormBlock final : public Block {
 public:
  using Residual = ModelConfig::Residual;
  NormBlock(const Parts& parts, bool experts, std::shared_ptr<Mixer> mixer,
            std::shared_ptr<GatedMlp> mlp, std::shared_ptr<Norm> mixer_norm,
            std::shared_ptr<Norm> mlp_norm)
      : mixer_norm_(register_module(parts.mixer_norm, std::move(mixer_norm))),
        mixer_(register_module(parts.mixer, std::move(mixer))),
        mlp_norm_(register_module(parts.mlp_norm, std::move(mlp_norm))),
        mlp_(register_module(experts ? parts.experts : parts.mlp, std::move(mlp))) {}

  void set_residuals(Residual mixer, Residual mlp, bool after_norm) {
    of_mixer_ = mixer;
    of_mlp_ = mlp;
    after_norm_ = after_norm;
  }

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override {
    at::Tensor h = mixer_norm_->forward(x_BTD);
    const at::Tensor mixed = add(x_BTD, h, mixer_->forward(h, sequences, state), of_mixer_);
    h = mlp_norm_->forward(mixed);
    return add(mixed, h, mlp_->forward(h), of_mlp_);
  }
  Mixer& mixer() override { return *mixer_; }

 private:
  at::Tensor add(const at::Tensor& x, const at::Tensor& normed, const at::Tensor& y,
                 Residual factors) const {
    at::Tensor kept = after_norm_ ? normed : x;
    if (factors.alpha != 1) kept = kept * factors.alpha;
    return at::add(kept, y, factors.beta);
  }

  Residual of_mixer_, of_mlp_;
  bool after_norm_ = false;
  std::shared_ptr<Norm> mixer_norm_;
  std::shared_ptr<Mixer> mixer_;
  std::shared_ptr<Norm> mlp_norm_;
  std::shared_ptr<GatedMlp> mlp_;
};

Result<std::shared_ptr<GatedMlp>> make_mlp(const ModelConfig& config, const Parts& parts) {
  if (config.num_experts == 0)
    return make_gated_mlp(parts.gated_mlp, config.hidden_size, config.intermediate_size,
                          config.num_layers());
  if (parts.experts == nullptr)
    return unsupported("num_experts = ", config.num_experts, " with block \"", config.block,
                       "\"; experts go with block \"llama\"");
  return make_experts(config.hidden_size, config.intermediate_size, config.num_experts,
                      config.experts_per_token, config.num_layers());
}

}  // namespace

Result<std::shared_ptr<Block>> make_block(const ModelConfig& config, std::int64_t index) {
  if (config.block == "megalodon") return make_megalodon_block(config, index);
  if (config.block == "torchscale") return make_torchscale_block(config, index);
  const std::string& name = config.layer_types[static_cast<std::size_t>(index)];
  EVERLONG_ASSIGN(const Mechanism* mechanism, find_mechanism(name));
  const auto settings = config.mechanisms.find(name);
  const LayerSpec spec{.hidden_size = config.hidden_size,
                       .layer_index = index,
                       .num_layers = config.num_layers(),
                       .norm_eps = config.norm_eps,
                       .settings = settings == config.mechanisms.end() ? nlohmann::json::object()
                                                                       : settings->second};
  EVERLONG_ASSIGN(auto mixer, mechanism->make_layer(spec));
  const Parts& parts = parts_of(config);
  EVERLONG_ASSIGN(auto mixer_norm, make_norm(parts.norm, config.hidden_size, config.norm_eps));
  EVERLONG_ASSIGN(auto mlp_norm, make_norm(parts.norm, config.hidden_size, config.norm_eps));
  EVERLONG_ASSIGN(auto mlp, make_mlp(config, parts));
  auto block =
      std::make_shared<NormBlock>(parts, config.num_experts > 0, std::move(mixer), std::move(mlp),
                                  std::move(mixer_norm), std::move(mlp_norm));
  block->set_residuals(config.residual(name), config.residual("mlp"), config.residual_after_norm);
  return std::shared_ptr<Block>(std::move(block));
}

namespace {

void check_sequences(const at::Tensor& tokens_BT, const Sequences& sequences,
                     const ModelState* state) {
  const auto& offsets = sequences.offsets;
  Status status;
  if (tokens_BT.dim() != 2 || tokens_BT.scalar_type() != at::kLong) {
    status = invalid_argument("tokens are ", tokens_BT.dim(), "-dimensional ",
                              tokens_BT.dtype().name(), "; int64 [batch, tokens] is needed");
  } else if (!offsets.empty() &&
             (tokens_BT.size(0) != 1 || offsets.front() != 0 ||
              offsets.back() != tokens_BT.size(1) || !std::ranges::is_sorted(offsets))) {
    status = invalid_argument("offsets of ", sequences.count(1), " sequences from ",
                              offsets.front(), " to ", offsets.back(), " do not divide tokens [",
                              tokens_BT.size(0), ", ", tokens_BT.size(1),
                              "]; they rise from 0 to the number of tokens, with a batch of 1");
  } else if (state != nullptr && state->sequences() != sequences.count(tokens_BT.size(0))) {
    status = invalid_argument("a state of ", state->sequences(), " sequences was given for ",
                              sequences.count(tokens_BT.size(0)));
  }
  throw_if_error(status);
}

}  // namespace

Result<std::shared_ptr<Decoder>> Decoder::make(const ModelConfig& config, WeightInit init) {
  const WeightInitScope scope(init);
  if (config.layer_types.empty())
    return invalid_argument("layer_types is empty; a model has at least one layer");
  std::shared_ptr<Decoder> model(new Decoder(config));
  EVERLONG_RETURN_IF_ERROR(model->build());
  return model;
}

// Registration gives the published names: model.embed_tokens.weight, model.layers.<i>..,
// model.norm.weight, lm_head.weight.
Status Decoder::build() {
  if (config_.block == "megalodon") return build_megalodon();
  if (config_.block == "torchscale") return build_torchscale();
  const auto drawn = [&] {
    return normal_weight({config_.vocab_size, config_.hidden_size}, config_.initializer_range);
  };
  const Parts& parts = parts_of(config_);
  auto model = register_module(parts.root, std::make_shared<ModuleGroup>());
  embedding_ = model->add(parts.embedding, std::make_shared<ModuleGroup>())->add_weight(drawn());
  auto layers = model->add(parts.layers, std::make_shared<ModuleGroup>());
  for (std::int64_t i = 0; i < config_.num_layers(); ++i) {
    auto block = make_block(config_, i);
    if (!block.ok()) return block.status().at(cat("layer ", i));
    blocks_.push_back(layers->add(std::to_string(i), *std::move(block)));
  }
  EVERLONG_ASSIGN(norm_, make_norm(parts.norm, config_.hidden_size, config_.norm_eps));
  model->add(parts.last_norm, norm_);
  head_ = config_.tie_word_embeddings
              ? embedding_
              : register_module("lm_head", std::make_shared<ModuleGroup>())->add_weight(drawn());
  return {};
}

std::int64_t Decoder::parameter_count() const {
  std::int64_t total = 0;
  for (const auto& parameter : parameters()) total += parameter.numel();
  return total;
}

ModelState Decoder::make_state(std::int64_t sequences) const {
  std::vector<std::unique_ptr<State>> layers;
  for (std::int64_t i = 0; i < config_.num_layers(); ++i)
    layers.push_back(mixer(i).make_state(sequences));
  if (time_norm_ != nullptr) layers.push_back(time_norm_->make_state(sequences));
  return ModelState(std::move(layers));
}

at::Tensor Decoder::hidden(const at::Tensor& tokens_BT, const Sequences& sequences,
                           ModelState* state) {
  check_sequences(tokens_BT, sequences, state);
  Sequences marked = sequences;
  if (config_.landmark_id >= 0 && !marked.marks.defined())
    marked.marks = tokens_BT.eq(config_.landmark_id).cpu();
  at::Tensor x_BTD = at::embedding(embedding_, tokens_BT);
  if (config_.scale_embedding) x_BTD = x_BTD * std::sqrt(static_cast<double>(config_.hidden_size));
  LayerTrace::show(-1, x_BTD);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    State* layer = state == nullptr ? nullptr : &state->layer(i);
    if (checkpointing_ && at::GradMode::is_enabled()) {
      const BlockFunction run = [block = blocks_[i], marked](const at::Tensor& x, State* carried) {
        return block->forward(x, marked, carried);
      };
      x_BTD = recomputed(run, x_BTD, layer, blocks_[i]->parameters());
    } else {
      x_BTD = blocks_[i]->forward(x_BTD, marked, layer);
    }
    LayerTrace::show(static_cast<std::int64_t>(i), x_BTD);
  }
  if (time_norm_ != nullptr)
    return time_norm_->forward(x_BTD, sequences,
                               state == nullptr ? nullptr : &state->layer(blocks_.size()));
  return norm_->forward(x_BTD);
}

at::Tensor Decoder::logits(const at::Tensor& hidden_BTD) { return at::linear(hidden_BTD, head_); }

}  // namespace everlong
