#include "models/torchscale_layer.h"

#include <ATen/ATen.h>

#include <cmath>

#include "models/module_group.h"

namespace everlong {
namespace {

constexpr const char* kName = "longnet";

// The model's last norm, with its bias.
class LastNorm final : public Norm {
 public:
  LastNorm(std::int64_t size, double eps)
      : eps_(eps),
        weight_(register_parameter("weight", constant_weight({size}, 1))),
        bias_(register_parameter("bias", constant_weight({size}, 0))) {}
  at::Tensor forward(const at::Tensor& x) override {
    return at::layer_norm(x, {weight_.size(0)}, weight_, bias_, eps_);
  }

 private:
  double eps_;
  at::Tensor weight_, bias_;
};

Status check(const ModelConfig& config) {
  for (std::size_t i = 0; i < config.layer_types.size(); ++i)
    if (config.layer_types[i] != kName)
      return unsupported("block \"torchscale\" with layer_types[", i, "] = \"",
                         config.layer_types[i],
                         "\"; its layers are all \"longnet\". For a mix take block \"llama\"");
  if (config.num_experts > 0)
    return unsupported("num_experts = ", config.num_experts,
                       " with block \"torchscale\"; experts go with block \"llama\"");
  if (config.residual_after_norm || !config.residuals.empty())
    return unsupported(
        "block \"torchscale\" adds its parts with weight 1; leave out residuals and "
        "residual_after_norm");
  return {};
}

}  // namespace

TorchscaleLayer::TorchscaleLayer(const TorchscaleSettings& s)
    : normalize_before_(s.normalize_before) {
  const std::int64_t D = s.attention.hidden_size, F = s.ffn_dim;
  const double eps = s.attention.norm_eps;
  const double depth = s.attention.subln
                           ? std::sqrt(std::log(2.0 * static_cast<double>(s.attention.num_layers)))
                           : 1;
  // Xavier's variance, 2 / (inputs + outputs).
  const auto gain = [&](std::int64_t from, std::int64_t to) {
    return depth * std::sqrt(2.0 * static_cast<double>(from) / static_cast<double>(from + to));
  };
  self_attn_ =
      register_module("self_attn", std::make_shared<longnet::DilatedSelfAttention>(s.attention));
  attention_norm_ = register_module("self_attn_layer_norm", std::make_shared<AffineNorm>(D, eps));
  auto ffn = register_module("ffn", std::make_shared<ModuleGroup>());
  fc1_ = ffn->add("fc1", std::make_shared<AffineLinear>(D, F, true, gain(D, F)));
  fc2_ = ffn->add("fc2", std::make_shared<AffineLinear>(F, D, true, gain(F, D)));
  if (s.attention.subln)
    inner_norm_ = ffn->add("ffn_layernorm", std::make_shared<AffineNorm>(F, eps));
  mlp_norm_ = register_module("final_layer_norm", std::make_shared<AffineNorm>(D, eps));
}

at::Tensor TorchscaleLayer::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                    State* state) {
  const auto part = [&](const at::Tensor& x, const AffineNorm& norm, const auto& f) {
    return normalize_before_ ? x + f(norm.forward(x)) : norm.forward(x + f(x));
  };
  const at::Tensor mixed = part(x_BTD, *attention_norm_, [&](const at::Tensor& x) {
    return self_attn_->forward(x, sequences, state);
  });
  return part(mixed, *mlp_norm_, [&](const at::Tensor& x) {
    at::Tensor h = at::gelu(fc1_->forward(x));
    if (inner_norm_ != nullptr) h = inner_norm_->forward(h);
    return fc2_->forward(h);
  });
}

Result<std::shared_ptr<Block>> make_torchscale_block(const ModelConfig& config,
                                                     std::int64_t index) {
  EVERLONG_RETURN_IF_ERROR(check(config));
  const auto found = config.mechanisms.find(kName);
  nlohmann::json settings =
      found == config.mechanisms.end() ? nlohmann::json::object() : found->second;
  if (!settings.contains("form")) settings["form"] = "torchscale";
  if (!settings.contains("norm_eps")) settings["norm_eps"] = config.norm_eps;
  EVERLONG_ASSIGN(auto attention, longnet::read_settings({.hidden_size = config.hidden_size,
                                                          .layer_index = index,
                                                          .num_layers = config.num_layers(),
                                                          .norm_eps = config.norm_eps,
                                                          .settings = settings}));
  if (!attention.torchscale)
    return invalid_argument(
        "block \"torchscale\" with longnet: form = \"llama\"; leave form out, or take block "
        "\"llama\"");
  return std::shared_ptr<Block>(std::make_shared<TorchscaleLayer>(
      TorchscaleSettings{.attention = attention, .ffn_dim = config.intermediate_size}));
}

// embed_tokens.weight, layers.<i>.., layer_norm.{weight,bias}, output_projection.weight: what
// remains of the published names behind fairseq's prefix "decoder.".
Status Decoder::build_torchscale() {
  EVERLONG_RETURN_IF_ERROR(check(config_));
  const auto drawn = [&] {
    return normal_weight({config_.vocab_size, config_.hidden_size}, config_.initializer_range);
  };
  embedding_ =
      register_module("embed_tokens", std::make_shared<ModuleGroup>())->add_weight(drawn());
  auto layers = register_module("layers", std::make_shared<ModuleGroup>());
  for (std::int64_t i = 0; i < config_.num_layers(); ++i) {
    auto block = make_torchscale_block(config_, i);
    if (!block.ok()) return block.status().at(cat("layer ", i));
    blocks_.push_back(layers->add(std::to_string(i), *std::move(block)));
  }
  norm_ = register_module("layer_norm",
                          std::make_shared<LastNorm>(config_.hidden_size, config_.norm_eps));
  head_ = config_.tie_word_embeddings
              ? embedding_
              : register_module("output_projection", std::make_shared<ModuleGroup>())
                    ->add_weight(drawn());
  return {};
}

}  // namespace everlong
