#include "models/megalodon_block.h"

#include <ATen/ATen.h>

#include "mechanisms/megalodon/layer.h"
#include "models/module_group.h"

namespace everlong {
namespace {

constexpr const char* kName = "megalodon";
constexpr double kCut = 3;  // deviations at which the drawn embedding and head are cut

class TwoHopBlock final : public Block {
 public:
  TwoHopBlock(std::shared_ptr<Mixer> mega, std::shared_ptr<megalodon::NormalizedFfn> nffn)
      : mega_(register_module("mega", std::move(mega))),
        nffn_(register_module("nffn", std::move(nffn))) {}

  at::Tensor forward(const at::Tensor& x_BTD, const Sequences& sequences, State* state) override {
    return nffn_->forward(x_BTD + mega_->forward(x_BTD, sequences, state), x_BTD);
  }
  Mixer& mixer() override { return *mega_; }

 private:
  std::shared_ptr<Mixer> mega_;
  std::shared_ptr<megalodon::NormalizedFfn> nffn_;
};

LayerSpec spec_of(const ModelConfig& config, std::int64_t index) {
  const auto settings = config.mechanisms.find(kName);
  return {.hidden_size = config.hidden_size,
          .layer_index = index,
          .num_layers = config.num_layers(),
          .norm_eps = config.norm_eps,
          .settings =
              settings == config.mechanisms.end() ? nlohmann::json::object() : settings->second};
}

Status check(const ModelConfig& config) {
  for (std::size_t i = 0; i < config.layer_types.size(); ++i)
    if (config.layer_types[i] != kName)
      return unsupported("block \"megalodon\" with layer_types[", i, "] = \"",
                         config.layer_types[i],
                         "\"; its layers are all \"megalodon\", which has its norms inside. "
                         "For a mix take block \"llama\"");
  if (config.num_experts > 0)
    return unsupported("num_experts = ", config.num_experts,
                       " with block \"megalodon\"; experts go with block \"llama\"");
  if (config.residual_after_norm || !config.residuals.empty())
    return unsupported(
        "block \"megalodon\" adds its parts with weight 1; leave out residuals and "
        "residual_after_norm");
  if (config.tie_word_embeddings && config.output_size > 0 &&
      config.output_size != config.vocab_size)
    return invalid_argument("output_size = ", config.output_size, " with a tied head of ",
                            config.vocab_size, " tokens; leave output_size out");
  return {};
}

}  // namespace

Result<std::shared_ptr<Block>> make_megalodon_block(const ModelConfig& config, std::int64_t index) {
  EVERLONG_RETURN_IF_ERROR(check(config));
  EVERLONG_ASSIGN(const auto settings, megalodon::read_settings(spec_of(config, index)));
  auto nffn = std::make_shared<megalodon::NormalizedFfn>(
      megalodon::FfnSettings{.width = config.hidden_size,
                             .hidden = config.intermediate_size,
                             .swiglu = config.gated_mlp,
                             .rescale = config.rescale_mlp,
                             .affine = settings.norm_affine,
                             .eps = settings.norm_eps,
                             .layer_index = index});
  return std::shared_ptr<Block>(std::make_shared<TwoHopBlock>(
      std::make_shared<megalodon::GatedAttention>(settings), std::move(nffn)));
}

// embed.weight, layers.<i>.{mega,nffn}.., output.final_norm.{weight,bias}, output.output.weight.
Status Decoder::build_megalodon() {
  const auto drawn = [&](std::int64_t rows) {
    return truncated_normal_weight({rows, config_.hidden_size}, config_.initializer_range, kCut);
  };
  EVERLONG_RETURN_IF_ERROR(check(config_));
  embedding_ = register_module("embed", std::make_shared<megalodon::Named>())
                   ->add("weight", drawn(config_.vocab_size));
  auto layers = register_module("layers", std::make_shared<ModuleGroup>());
  for (std::int64_t i = 0; i < config_.num_layers(); ++i) {
    auto block = make_megalodon_block(config_, i);
    if (!block.ok()) return block.status().at(cat("layer ", i));
    blocks_.push_back(layers->add(std::to_string(i), *std::move(block)));
  }
  EVERLONG_ASSIGN(const auto settings, megalodon::read_settings(spec_of(config_, 0)));
  auto output = register_module("output", std::make_shared<ModuleGroup>());
  time_norm_ = output->add("final_norm", std::make_shared<megalodon::TimestepNorm>(
                                             config_.hidden_size, settings.norm_num_groups,
                                             settings.norm_eps, settings.norm_window));
  const std::int64_t rows = config_.output_size > 0 ? config_.output_size : config_.vocab_size;
  head_ =
      config_.tie_word_embeddings
          ? embedding_
          : output->add("output", std::make_shared<megalodon::Named>())->add("weight", drawn(rows));
  return {};
}

}  // namespace everlong
