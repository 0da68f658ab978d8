#include "mechanisms/lightning/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/settings.h"
#include "layers/norm.h"

namespace everlong::lightning {
namespace {

constexpr std::int64_t kUsualHeadDim = 64;

std::string describe(const at::Tensor& t) {
  return t.defined() ? cat(t.scalar_type(), " ", t.sizes()) : std::string("no tensor");
}

// The absolute position of every token: [1, T] where all rows are at the same place (then one row
// serves all).
at::Tensor positions_of(const Sequences& sequences, const State* state, std::int64_t batch,
                        std::int64_t tokens, at::Device device) {
  const std::int64_t count = sequences.count(batch);
  const auto start = [&](std::int64_t n) {
    return state == nullptr ? 0 : state->positions()[static_cast<std::size_t>(n)];
  };
  if (sequences.offsets.empty()) {
    std::vector<std::int64_t> starts;
    for (std::int64_t n = 0; n < count; ++n) starts.push_back(start(n));
    if (std::ranges::all_of(starts, [&](auto s) { return s == starts.front(); })) starts.resize(1);
    return at::tensor(starts, at::kLong).to(device).unsqueeze(1) +
           at::arange(tokens, at::device(device).dtype(at::kLong));
  }
  std::vector<std::int64_t> positions;
  for (std::int64_t n = 0; n < count; ++n)
    for (std::int64_t t = 0; t < sequences.length(n, tokens); ++t)
      positions.push_back(start(n) + t);
  return at::tensor(positions, at::kLong).to(device).unsqueeze(0);
}

}  // namespace

Result<LayerSettings> LayerSettings::read(const LayerSpec& spec) {
  Settings s(spec.settings, "lightning");
  LayerSettings out;
  const std::int64_t hidden = spec.hidden_size;
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
  const std::string lrpe = s.choice("lrpe", "none", {"none", "first_layer", "all"});
  out.lrpe = lrpe == "all"           ? LrpeLayers::kAll
             : lrpe == "first_layer" ? LrpeLayers::kFirst
                                     : LrpeLayers::kNone;
  out.norm_eps = s.number("norm_eps", spec.norm_eps, 0, 1);
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return out;
}

Status LightningState::restore(const TensorMap& tensors) {
  const auto found = tensors.find("S");
  if (found == tensors.end() || tensors.size() != 1)
    return invalid_argument("lightning: a state has one tensor, S; given ", tensors.size(),
                            " tensors", found == tensors.end() ? " without S" : "");
  const at::Tensor& S = found->second;
  if (!S.defined() || S.sizes() != S_.sizes() || S.scalar_type() != S_.scalar_type())
    return invalid_argument("lightning: S is ", describe(S), "; this state holds ", describe(S_));
  S_ = S.to(S_.device());
  return {};
}

std::unique_ptr<State> LightningState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<LightningState>(select_sequences(S_, sequences));
  out->positions() = selected_positions(sequences);
  return out;
}

std::int64_t LightningState::bytes_bound(std::int64_t /*tokens*/) const {
  return static_cast<std::int64_t>(S_.nbytes()) +
         sequences() * static_cast<std::int64_t>(sizeof(std::int64_t));
}

Result<std::shared_ptr<Mixer>> GatedLinearAttention::make(const LayerSpec& spec) {
  if (spec.hidden_size < 1)
    return invalid_argument("lightning: hidden_size = ", spec.hidden_size,
                            "; at least 1 is needed");
  EVERLONG_ASSIGN(const LayerSettings settings, LayerSettings::read(spec));
  EVERLONG_ASSIGN(auto slope, slopes(settings.slope_rule, settings.num_heads, spec.layer_index,
                                     spec.num_layers));
  return std::shared_ptr<Mixer>(
      std::make_shared<GatedLinearAttention>(spec, settings, std::move(slope)));
}

GatedLinearAttention::GatedLinearAttention(const LayerSpec& spec, const LayerSettings& settings,
                                           std::vector<double> slope)
    : settings_(settings), decay_(std::move(slope), /*scale=*/1.0) {
  const std::int64_t width = settings.num_heads * settings.head_dim;
  qkvu_proj_ = register_module("qkvu_proj", std::make_shared<Linear>(spec.hidden_size, 4 * width));
  out_proj_ = register_module("out_proj", std::make_shared<Linear>(width, spec.hidden_size,
                                                                   residual_gain(spec.num_layers)));
  if (settings.lrpe == LrpeLayers::kAll ||
      (settings.lrpe == LrpeLayers::kFirst && spec.layer_index == 0))
    lrpe_ = register_module("lrpe", std::make_shared<Lrpe>(settings.num_heads, settings.head_dim));
}

std::unique_ptr<State> GatedLinearAttention::make_state(std::int64_t sequences) const {
  const at::Tensor& weight = qkvu_proj_->weight();
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return std::make_unique<LightningState>(
      at::zeros({sequences, settings_.num_heads, key_dim(), settings_.head_dim},
                weight.options().dtype(dtype).requires_grad(false)));
}

std::string GatedLinearAttention::path(at::Device) const { return "composite (ATen)"; }

at::Tensor GatedLinearAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                         State* state) {
  const std::int64_t B = x_BTD.size(0), T = x_BTD.size(1), H = settings_.num_heads,
                     D = settings_.head_dim;
  auto* own = dynamic_cast<LightningState*>(state);
  TORCH_CHECK_VALUE(state == nullptr || own != nullptr,
                    "lightning: the state belongs to a layer of another mechanism");
  TORCH_CHECK_VALUE(own == nullptr || own->sequences() == sequences.count(B),
                    "lightning: the state holds ", own == nullptr ? 0 : own->sequences(),
                    " sequences and the call ", sequences.count(B));

  // Split, not sliced: the gradient is then put together once, where each slice would bring a
  // zero-filled whole.
  const auto qk_v_u =
      qkvu_proj_->forward(x_BTD).view({B, T, 4, H, D}).split_with_sizes({2, 1, 1}, 2);
  at::Tensor qk = qk_v_u[0];
  if (settings_.activation == Activation::kSilu) qk = at::silu(qk);
  if (lrpe_ != nullptr) qk = lrpe_->forward(qk, positions_of(sequences, own, B, T, x_BTD.device()));
  const auto q_k = qk.unbind(2);
  const Attention attention =
      decay_linear_attention(q_k[0], q_k[1], qk_v_u[1].squeeze(2), decay_, sequences.offsets,
                             own == nullptr ? std::nullopt : std::optional(own->matrices()));
  if (own != nullptr) {
    own->set_matrices(attention.state_NHKV);
    for (std::int64_t n = 0; n < own->sequences(); ++n)
      own->positions()[static_cast<std::size_t>(n)] += sequences.length(n, T);
  }
  const at::Tensor normed =
      simple_rms_norm(attention.o_BTHV.reshape({B, T, H * D}), settings_.norm_eps);
  return out_proj_->forward(qk_v_u[2].reshape({B, T, H * D}) * normed);
}

}  // namespace everlong::lightning
