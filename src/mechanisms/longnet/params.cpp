#include "mechanisms/longnet/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"
#include "kernels/attention_shapes.h"

namespace everlong::longnet {
namespace {

constexpr std::int64_t kLastPosition = std::int64_t{1} << 60;

}  // namespace

Result<std::vector<Pattern>> make_patterns(std::span<const std::int64_t> segments,
                                           std::span<const std::int64_t> ratios) {
  if (segments.size() != ratios.size())
    return invalid_argument("longnet: segment_length has ", segments.size(),
                            " entries and dilated_ratio ", ratios.size(),
                            "; pattern i is (segment_length[i], dilated_ratio[i])");
  std::vector<Pattern> patterns;
  for (std::size_t i = 0; i < segments.size(); ++i) patterns.push_back({segments[i], ratios[i]});
  Geometry geometry;
  geometry.patterns = patterns;
  EVERLONG_RETURN_IF_ERROR(validate(geometry));
  return patterns;
}

Result<OffsetRule> offset_rule_of(const std::string& name) {
  if (name == "mod") return OffsetRule::kMod;
  if (name == "block") return OffsetRule::kBlock;
  return invalid_argument("longnet: offset_rule = \"", name,
                          "\"; \"mod\" (the paper) or \"block\" (torchscale)");
}

Result<Beyond> beyond_of(const std::string& name) {
  if (name == "fixed") return Beyond::kFixed;
  if (name == "grow") return Beyond::kGrow;
  return invalid_argument("longnet: beyond = \"", name, "\"; \"fixed\" or \"grow\"");
}

Status read_shapes(Shape q, Shape k, Shape v, Params& params) {
  EVERLONG_ASSIGN(const AttentionSizes sizes, attention_sizes("longnet", q, k, v));
  sizes.put_into(params);
  return {};
}

Status validate(const Geometry& s) {
  const auto count = static_cast<std::int64_t>(s.patterns.size());
  if (count < 1 || count > kMostPatterns)
    return invalid_argument("longnet: segment_length has ", count, " patterns; 1 to ",
                            kMostPatterns, " are allowed");
  for (std::size_t i = 0; i < s.patterns.size(); ++i) {
    const Pattern& p = s.patterns[i];
    if (p.segment < 1 || p.segment > kLongestSegment)
      return invalid_argument("longnet: segment_length[", i, "] = ", p.segment, "; 1 to ",
                              kLongestSegment, " tokens are allowed");
    if (p.ratio < 1 || p.ratio > kLongestSegment)
      return invalid_argument("longnet: dilated_ratio[", i, "] = ", p.ratio, "; 1 to ",
                              kLongestSegment, " are allowed");
    if (s.beyond == Beyond::kGrow && i > 0 && p.segment < s.patterns[i - 1].segment)
      return invalid_argument("longnet: segment_length[", i, "] = ", p.segment,
                              " is shorter than the one before; beyond = \"grow\" brings patterns "
                              "in one after the other and needs them from short to long");
  }
  if (s.phantom && s.causal)
    return invalid_argument(
        "longnet: pad = \"phantom\" with causal attention; the padding lies behind every query "
        "there and is never seen: use pad = \"exact\"");
  if (s.beyond == Beyond::kGrow && !s.causal)
    return invalid_argument(
        "longnet: beyond = \"grow\" orders patterns by the text so far, which only causal "
        "attention has; use \"fixed\"");
  return {};
}

Status validate(const Params& p) {
  EVERLONG_RETURN_IF_ERROR(check_sizes("longnet", AttentionSizes::of(p)));
  if (!std::isfinite(p.scale) || p.scale <= 0)
    return invalid_argument("longnet: scale = ", p.scale, "; a finite number > 0 is needed");
  EVERLONG_RETURN_IF_ERROR(validate(p.geometry));
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("longnet"));
  if (p.positions.empty()) return {};
  if (!p.geometry.causal)
    return invalid_argument(
        "longnet: a state was given to bidirectional attention; only causal attention streams");
  if (static_cast<std::int64_t>(p.positions.size()) != p.sequences())
    return invalid_argument("longnet: state position has ", p.positions.size(), " entries for ",
                            p.sequences(), " sequences; one each is needed");
  for (std::size_t n = 0; n < p.positions.size(); ++n)
    if (p.positions[n] < 0 || p.positions[n] > kLastPosition)
      return invalid_argument("longnet: state position[", n, "] = ", p.positions[n], "; 0 to ",
                              kLastPosition, " are allowed");
  return {};
}

double default_scale(std::int64_t key_dim) { return 1.0 / std::sqrt(static_cast<double>(key_dim)); }

std::int64_t offset_of(OffsetRule rule, std::int64_t kv_head, std::int64_t kv_heads,
                       std::int64_t ratio) {
  if (rule == OffsetRule::kMod) return kv_head % ratio;
  const std::int64_t heads_each = kv_heads / ratio + (kv_heads % ratio != 0 ? 1 : 0);
  return kv_head / heads_each;
}

std::int64_t rows_held(const Pattern& pattern, std::int64_t offset, std::int64_t position) {
  if (position == 0) return 0;
  return lattice_rows((position - 1) % pattern.segment + 1, offset, pattern.ratio);
}

}  // namespace everlong::longnet
