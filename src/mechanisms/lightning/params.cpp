#include "mechanisms/lightning/params.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "core/offsets.h"

namespace everlong::lightning {
namespace {

constexpr double kLayerOffset =
    1e-5;  // keeps the last layer's decay above zero, in every published variant

std::vector<double> alibi(std::int64_t heads) {
  const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(heads)));
  std::vector<double> base;
  for (std::int64_t h = 0; h < power; ++h)
    base.push_back(std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(power)));
  for (std::int64_t j = 0; j < heads - power; ++j)
    base.push_back(
        std::exp2(-8.0 * static_cast<double>(2 * j + 1) / static_cast<double>(2 * power)));
  return base;
}

double layer_factor(double layer, double denominator) {
  return denominator > 0 ? 1.0 - layer / denominator + kLayerOffset : 1.0 + kLayerOffset;
}

Status validate_values(const Shape& shape, std::span<const double> slope, double scale) {
  if (static_cast<std::int64_t>(slope.size()) != shape.heads)
    return invalid_argument("slope has ", slope.size(), " values for ", shape.heads,
                            " heads; one per head is needed");
  for (std::size_t h = 0; h < slope.size(); ++h)
    if (!(slope[h] >= 0) || std::isinf(slope[h]))
      return invalid_argument(
          "slope[", h, "] = ", slope[h],
          " is not allowed; a slope is a decay in nats per token, finite and >= 0");
  if (!std::isfinite(scale))
    return invalid_argument("scale = ", scale, " is not allowed; a finite number is needed");
  return {};
}

Status validate_sizes(const Shape& shape) {
  if (shape.batch < 1) return invalid_argument("batch = ", shape.batch, "; at least 1 is needed");
  if (shape.tokens < 0)
    return invalid_argument("tokens = ", shape.tokens, "; 0 or more are needed");
  if (shape.heads < 1 || shape.heads > kMaxHeads)
    return invalid_argument("heads = ", shape.heads, "; allowed: 1 to ", kMaxHeads);
  if (shape.key_dim < 1 || shape.key_dim > kMaxHeadDim)
    return invalid_argument("key dim = ", shape.key_dim, "; allowed: 1 to ", kMaxHeadDim);
  if (shape.value_dim < 1 || shape.value_dim > kMaxHeadDim)
    return invalid_argument("value dim = ", shape.value_dim, "; allowed: 1 to ", kMaxHeadDim);
  return {};
}

}  // namespace

std::vector<std::string> slope_rule_names() {
  std::vector<std::string> names;
  for (const auto& entry : kSlopeRules) names.emplace_back(entry.name);
  return names;
}

Result<SlopeRule> parse_slope_rule(std::string_view name) {
  for (const auto& entry : kSlopeRules)
    if (entry.name == name) return entry.rule;
  const auto names = slope_rule_names();
  const std::string near = nearest(name, names);
  return invalid_argument("lightning: \"", name,
                          "\" is not a slope rule; known: ", join(names, ", "),
                          near.empty() ? "" : cat(". Did you mean \"", near, "\"?"));
}

Result<std::vector<double>> slopes(SlopeRule rule, std::int64_t heads, std::int64_t layer,
                                   std::int64_t num_layers) {
  if (heads < 1 || heads > kMaxHeads)
    return invalid_argument("lightning: slopes for ", heads, " heads; allowed: 1 to ", kMaxHeads);
  if (num_layers < 1)
    return invalid_argument("lightning: num_layers = ", num_layers, "; at least 1 is needed");
  if (layer < 0 || layer >= num_layers)
    return invalid_argument("lightning: layer ", layer, " of a model of ", num_layers,
                            " layers; allowed: 0 to ", num_layers - 1);
  const auto l = static_cast<double>(layer), last = static_cast<double>(num_layers - 1);
  const auto H = static_cast<double>(heads);
  std::vector<double> out = alibi(heads);
  const auto times = [&](double factor) {
    for (double& s : out) s *= factor;
  };
  switch (rule) {
    case SlopeRule::kAlibi:
      break;
    case SlopeRule::kAlibiLayer:
      times(layer_factor(l, last));
      break;
    case SlopeRule::kLing:
      times(layer_factor(l - 1, last));
      break;
    case SlopeRule::kLingClamped:
      times(layer_factor(std::max(l - 1, 0.0), last));
      break;
    case SlopeRule::kMinimaxHf:
      for (std::size_t h = 0; h < out.size(); ++h)
        out[h] = std::pow(std::exp2(-8.0 / H), static_cast<double>(h + 1));
      times(layer_factor(l, last + kLayerOffset));
      break;
    case SlopeRule::kPaper:
      for (std::size_t h = 0; h < out.size(); ++h)
        out[h] = 8.0 * static_cast<double>(h) / H * (1.0 - l / static_cast<double>(num_layers));
      break;
  }
  return out;
}

Status validate(const Shape& shape, std::span<const double> slope, double scale) {
  Status status = validate_sizes(shape);
  if (status.ok()) status = check_offsets(shape.cu_seqlens, shape.batch, shape.tokens);
  if (status.ok()) status = validate_values(shape, slope, scale);
  return status.at("lightning");
}

}  // namespace everlong::lightning
