#include "mechanisms/lightning/layer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "core/settings.h"
#include "mechanisms/lightning/op_cuda.h"

namespace everlong::lightning {
namespace {

constexpr std::int64_t kUsualHeadDim = 64;
constexpr double kMinimaxNormEps = 1e-6;  // the published class's own default, which nothing sets

// Whether this layer has LRPE.
bool read_lrpe(Settings& s, const LayerSpec& spec) {
  const nlohmann::json given = s.raw("lrpe");
  if (!given.is_array()) {
    const std::string which = s.choice("lrpe", "none", {"none", "first_layer", "all"});
    return which == "all" || (which == "first_layer" && spec.layer_index == 0);
  }
  const auto flag = [](const nlohmann::json& item) { return item == 0 || item == 1; };
  if (static_cast<std::int64_t>(given.size()) == spec.num_layers &&
      std::ranges::all_of(given, flag))
    return given.at(static_cast<std::size_t>(spec.layer_index)) == 1;
  s.fail(invalid_argument("lrpe is a list of ", given.size(), " for ", spec.num_layers,
                          " layers; a list has 0 or 1 for each layer of the model"));
  return false;
}

}  // namespace

Result<LayerSettings> LayerSettings::read(const LayerSpec& spec) {
  Settings s(spec.settings, "lightning");
  LayerSettings out;
  const std::int64_t hidden = spec.hidden_size;
  const bool minimax = s.choice("form", "transnormer", {"transnormer", "minimax"}) == "minimax";
  out.form = minimax ? Form::kMinimax : Form::kTransnormer;
  out.num_heads =
      s.integer("num_heads",
                hidden % kUsualHeadDim == 0 ? std::max<std::int64_t>(hidden / kUsualHeadDim, 1) : 1,
                1, kMaxHeads);
  if (!s.has("head_dim") && hidden % out.num_heads != 0)
    s.fail(invalid_argument("hidden_size ", hidden, " is not a multiple of num_heads ",
                            out.num_heads, "; give head_dim, or another num_heads"));
  out.head_dim =
      s.integer("head_dim", std::max<std::int64_t>(hidden / out.num_heads, 1), 1, kMaxHeadDim / 2);
  const auto rule = parse_slope_rule(s.choice("slope_rule", "alibi_layer", slope_rule_names()));
  if (rule.ok()) out.slope_rule = *rule;
  out.activation = s.choice("activation", "silu", {"silu", "none"}) == "silu" ? Activation::kSilu
                                                                              : Activation::kNone;
  out.lrpe = read_lrpe(s, spec);
  if (minimax && s.has("lrpe") && s.raw("lrpe") != "none")
    s.fail(
        invalid_argument("lrpe belongs to form \"transnormer\"; form \"minimax\" has no position"
                         " embedding: leave lrpe out"));
  out.norm_eps = s.number("norm_eps", minimax ? kMinimaxNormEps : spec.norm_eps, 0, 1);
  const std::string behind = s.choice("write_behind", "auto", {"auto", "on", "off"});
  out.write_behind = behind == "on"    ? WriteBehind::kOn
                     : behind == "off" ? WriteBehind::kOff
                                       : WriteBehind::kAuto;
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return out;
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  if (spec.hidden_size < 1)
    return invalid_argument("lightning: hidden_size = ", spec.hidden_size,
                            "; at least 1 is needed");
  EVERLONG_ASSIGN(const LayerSettings settings, LayerSettings::read(spec));
  EVERLONG_ASSIGN(auto slope, slopes(settings.slope_rule, settings.num_heads, spec.layer_index,
                                     spec.num_layers));
  if (settings.form == Form::kMinimax)
    return std::shared_ptr<Mixer>(
        std::make_shared<MinimaxAttention>(spec, settings, std::move(slope)));
  return std::shared_ptr<Mixer>(
      std::make_shared<GatedLinearAttention>(spec, settings, std::move(slope)));
}

LightningLayer::LightningLayer(const LayerSettings& settings, std::vector<double> slope)
    : settings_(settings), decay_(std::move(slope), /*scale=*/1.0) {}

void LightningLayer::add_out_proj(const LayerSpec& spec) {
  out_proj_ = register_module(
      "out_proj", std::make_shared<Linear>(settings_.num_heads * settings_.head_dim,
                                           spec.hidden_size, residual_gain(spec.num_layers)));
}

std::unique_ptr<State> LightningLayer::make_state(std::int64_t sequences) const {
  const at::Tensor& weight = out_proj_->weight();
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return std::make_unique<LightningState>(
      at::zeros({sequences, settings_.num_heads, settings_.key_dim(), settings_.head_dim},
                weight.options().dtype(dtype).requires_grad(false)),
      decay_, settings_.write_behind, weight.scalar_type());
}

std::string LightningLayer::path(at::Device device) const {
  if (device.is_cuda()) {
    const std::string why =
        why_not_engine(device, out_proj_->weight().scalar_type(), settings_.num_heads,
                       settings_.key_dim(), settings_.head_dim);
    if (why.empty()) return "Hopper kernel";
    const bool sweeps =
        takes_cuda_sweep(device, out_proj_->weight().scalar_type(), settings_.num_heads,
                         settings_.key_dim(), settings_.head_dim);
    return cat(sweeps ? "CUDA sweep" : "composite (ATen)", "; not the Hopper kernel: ", why);
  }
  if (!device.is_cpu()) return "composite (ATen)";
  const auto options = out_proj_->weight().options().requires_grad(false).device(device);
  const at::Tensor qk = at::empty({1, 0, 1, settings_.key_dim()}, options);
  const at::Tensor v = at::empty({1, 0, 1, settings_.head_dim}, options);
  return path_taken(qk, qk, v) == "cpu" ? "cpu kernel" : "composite (ATen)";
}

LightningState* LightningLayer::own_state(const at::Tensor& x_BTD, const Sequences& sequences,
                                          State* state) const {
  auto* own = dynamic_cast<LightningState*>(state);
  const std::int64_t count = sequences.count(x_BTD.size(0));
  TORCH_CHECK_VALUE(state == nullptr || own != nullptr,
                    "lightning: the state belongs to a layer of another mechanism");
  TORCH_CHECK_VALUE(own == nullptr || own->sequences() == count, "lightning: the state holds ",
                    own == nullptr ? 0 : own->sequences(), " sequences and the call ", count);
  return own;
}

at::Tensor LightningLayer::attend(at::Tensor q, at::Tensor k, at::Tensor v,
                                  const Sequences& sequences, LightningState* state,
                                  Fusion fusion) const {
  at::Tensor o;
  fusion.final_state = state != nullptr;
  if (state != nullptr && sequences.offsets.empty() && q.size(1) == 1) {
    q = silu_where(std::exchange(fusion.silu_q, false), q);
    k = silu_where(std::exchange(fusion.silu_k, false), k);
    v = silu_where(std::exchange(fusion.silu_v, false), v);
    o = state->step_behind(q, k, v);
  }
  if (!o.defined()) {
    const Attention attention = decay_linear_attention(
        q, k, v, decay_, sequences.offsets,
        state == nullptr ? std::nullopt : std::optional(state->matrices()), Path::kAuto, fusion);
    if (state != nullptr) state->set_matrices(attention.state_NHKV);
    o = attention.o_BTHV;
  }
  if (state != nullptr)
    for (std::int64_t n = 0; n < state->sequences(); ++n)
      state->positions()[static_cast<std::size_t>(n)] += sequences.length(n, q.size(1));
  return o.flatten(2);
}

}  // namespace everlong::lightning
