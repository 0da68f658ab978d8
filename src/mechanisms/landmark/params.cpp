#include "mechanisms/landmark/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"
#include "kernels/attention_shapes.h"

namespace everlong::landmark {
namespace {

constexpr std::int64_t kMostBlock = std::int64_t{1} << 20;
constexpr std::int64_t kMostBlocks = std::int64_t{1} << 40;

}  // namespace

Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params) {
  EVERLONG_ASSIGN(const AttentionSizes sizes, attention_sizes("landmark", q, k, v));
  sizes.put_into(params);
  EVERLONG_ASSIGN(const std::int64_t rows,
                  cache_rows("landmark", state_k, state_v, params.sequences(), sizes));
  if (!state_k.empty()) params.state_capacity = rows;
  return {};
}

Status validate(const Params& p) {
  EVERLONG_RETURN_IF_ERROR(check_sizes("landmark", AttentionSizes::of(p)));
  if (!std::isfinite(p.scale) || p.scale <= 0)
    return invalid_argument("landmark: scale = ", p.scale, "; a finite number > 0 is needed");
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("landmark"));
  return check_cache_lengths("landmark", p.state_lengths, p.sequences(), p.state_capacity);
}

double default_scale(std::int64_t key_dim) { return 1.0 / std::sqrt(static_cast<double>(key_dim)); }

std::vector<std::uint8_t> regular_landmarks(std::int64_t first, std::int64_t count,
                                            std::int64_t block, std::int64_t phase) {
  std::vector<std::uint8_t> marks(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    marks[static_cast<std::size_t>(i)] = (first + i + phase) % block == block - 1 ? 1 : 0;
  return marks;
}

std::vector<Section> sections_of(std::span<const std::uint8_t> is_landmark) {
  std::vector<Section> sections;
  const auto count = static_cast<std::int64_t>(is_landmark.size());
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (is_landmark[static_cast<std::size_t>(i)] == 0) continue;
    sections.push_back({begin, i, true});
    begin = i + 1;
  }
  if (begin < count) sections.push_back({begin, count, false});
  return sections;
}

Result<Granularity> parse_granularity(const std::string& name) {
  for (const Granularity g :
       {Granularity::kTokenHead, Granularity::kHeadMaxOverTokens, Granularity::kTokenMaxOverHeads})
    if (name == name_of(g)) return g;
  return invalid_argument("landmark: granularity = \"", name,
                          "\"; allowed: token_head, head_max_over_tokens, token_max_over_heads");
}

const char* name_of(Granularity granularity) {
  switch (granularity) {
    case Granularity::kTokenHead:
      return "token_head";
    case Granularity::kHeadMaxOverTokens:
      return "head_max_over_tokens";
    case Granularity::kTokenMaxOverHeads:
      break;
  }
  return "token_max_over_heads";
}

Result<BlockScore> parse_block_score(const std::string& name) {
  if (name == "landmark") return BlockScore::kLandmark;
  if (name == "mean") return BlockScore::kMean;
  if (name == "max") return BlockScore::kMax;
  return invalid_argument("landmark: score = \"", name, "\"; allowed: landmark, mean, max");
}

std::vector<std::uint8_t> landmarks_of(const Retrieval& r, std::int64_t first, std::int64_t count) {
  if (r.has_landmarks()) return regular_landmarks(first, count, r.block);
  return std::vector<std::uint8_t>(static_cast<std::size_t>(count), 0);
}

Status validate(const Retrieval& r) {
  if (r.block < 2 || r.block > kMostBlock)
    return invalid_argument("landmark: block = ", r.block, "; 2 to ", kMostBlock,
                            " tokens are allowed, the landmark included");
  if (r.top_k < -1 || r.window < 0 || r.max_blocks < 0 || r.top_k > kMostBlocks ||
      r.window > kMostBlocks || r.max_blocks > kMostBlocks)
    return invalid_argument(
        "landmark: top_k = ", r.top_k, ", window = ", r.window, ", max_blocks = ", r.max_blocks,
        "; 0 to ", kMostBlocks,
        " blocks are allowed (top_k and max_blocks: 0 is all; top_k: -1 is none)");
  if (r.chunked && r.window > 0)
    return invalid_argument("landmark: window = ", r.window,
                            " with mode \"chunk\", where the chunk itself is what is local; give ",
                            "window 0 or mode \"window\"");
  if (!r.chunked && r.granularity == Granularity::kHeadMaxOverTokens)
    return invalid_argument("landmark: granularity \"head_max_over_tokens\" lets later tokens ",
                            "choose for earlier ones and is offered with mode \"chunk\" only; ",
                            "allowed here: token_head, token_max_over_heads");
  return {};
}

std::vector<Group> groups_of(const Retrieval& r, std::int64_t start, std::int64_t tokens) {
  std::vector<Group> groups;
  const std::int64_t stop = start + tokens;
  if (r.chunked) {
    if (tokens > 0) groups.push_back({start, stop, r.first_local(start, start)});
    return groups;
  }
  for (std::int64_t begin = start; begin < stop;) {
    const std::int64_t end = std::min((begin / r.block + 1) * r.block, stop);
    groups.push_back({begin, end, r.first_local(begin, start)});
    begin = end;
  }
  return groups;
}

}  // namespace everlong::landmark
