#include "mechanisms/longnet/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"

namespace everlong::longnet {
namespace {

std::string brackets(Shape shape) {
  std::vector<std::string> sizes;
  for (const auto size : shape) sizes.push_back(cat(size));
  return cat("[", join(sizes, ", "), "]");
}

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
  if (q.size() != 4 || k.size() != 4 || v.size() != 4)
    return invalid_argument("longnet: q, k, v have shapes ", brackets(q), ", ", brackets(k), ", ",
                            brackets(v), "; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1])
    return invalid_argument("longnet: q, k, v have ", q[0], ", ", k[0], ", ", v[0], " rows of ",
                            q[1], ", ", k[1], ", ", v[1],
                            " tokens; batch and tokens must agree (past keys come in the state)");
  if (k[3] != q[3])
    return invalid_argument("longnet: the key dim of q is ", q[3], " and that of k ", k[3],
                            "; they must agree (v may differ)");
  if (k[2] != v[2])
    return invalid_argument("longnet: k has ", k[2], " heads and v ", v[2], "; they must agree");
  params.batch = q[0];
  params.tokens = q[1];
  params.heads = q[2];
  params.kv_heads = k[2];
  params.key_dim = q[3];
  params.value_dim = v[3];
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
  if (p.batch < 1 || p.tokens < 0)
    return invalid_argument("longnet: batch ", p.batch, " of ", p.tokens,
                            " tokens; at least one row is needed (no tokens in it are legal)");
  if (p.key_dim < 1 || p.value_dim < 1)
    return invalid_argument("longnet: key dim ", p.key_dim, " and value dim ", p.value_dim,
                            "; both must be >= 1");
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0)
    return invalid_argument("longnet: ", p.heads, " query heads cannot share ", p.kv_heads,
                            " key/value heads; a multiple of ",
                            std::max<std::int64_t>(p.kv_heads, 1), ", at least one, is needed");
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
