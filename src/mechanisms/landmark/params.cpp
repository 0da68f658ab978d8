#include "mechanisms/landmark/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"

namespace everlong::landmark {
namespace {

constexpr std::int64_t kMostBlock = std::int64_t{1} << 20;
constexpr std::int64_t kMostBlocks = std::int64_t{1} << 40;

std::string brackets(Shape shape) {
  std::vector<std::string> sizes;
  for (const auto size : shape) sizes.push_back(cat(size));
  return cat("[", join(sizes, ", "), "]");
}

Status check_cache(const char* name, Shape shape, std::int64_t dim, const Params& params) {
  if (shape.size() != 4 || shape[0] != params.sequences() || shape[2] != params.kv_heads ||
      shape[3] != dim)
    return invalid_argument("landmark: state ", name, " has shape ", brackets(shape), "; [",
                            params.sequences(), ", rows, ", params.kv_heads, ", ", dim,
                            "] is needed: sequences, rows, heads, dim");
  return {};
}

}  // namespace

Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params) {
  if (q.size() != 4 || k.size() != 4 || v.size() != 4)
    return invalid_argument("landmark: q, k, v have shapes ", brackets(q), ", ", brackets(k), ", ",
                            brackets(v), "; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1])
    return invalid_argument("landmark: q, k, v have ", q[0], ", ", k[0], ", ", v[0], " rows of ",
                            q[1], ", ", k[1], ", ", v[1],
                            " tokens; batch and tokens must agree (past keys come in the state)");
  if (k[3] != q[3])
    return invalid_argument("landmark: the key dim of q is ", q[3], " and that of k ", k[3],
                            "; they must agree (v may differ)");
  if (k[2] != v[2])
    return invalid_argument("landmark: k has ", k[2], " heads and v ", v[2], "; they must agree");
  params.batch = q[0];
  params.tokens = q[1];
  params.heads = q[2];
  params.kv_heads = k[2];
  params.key_dim = q[3];
  params.value_dim = v[3];
  if (state_k.empty() && state_v.empty()) return {};
  EVERLONG_RETURN_IF_ERROR(check_cache("k", state_k, params.key_dim, params));
  EVERLONG_RETURN_IF_ERROR(check_cache("v", state_v, params.value_dim, params));
  if (state_k[1] != state_v[1])
    return invalid_argument("landmark: state k has ", state_k[1], " rows and state v ", state_v[1],
                            "; they must agree");
  params.state_capacity = state_k[1];
  return {};
}

Status validate(const Params& p) {
  if (p.batch < 1 || p.tokens < 0)
    return invalid_argument("landmark: batch ", p.batch, " of ", p.tokens,
                            " tokens; at least one row is needed (no tokens in it are legal)");
  if (p.key_dim < 1 || p.value_dim < 1)
    return invalid_argument("landmark: key dim ", p.key_dim, " and value dim ", p.value_dim,
                            "; both must be >= 1");
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0)
    return invalid_argument("landmark: ", p.heads, " query heads cannot share ", p.kv_heads,
                            " key/value heads; a multiple of ",
                            std::max<std::int64_t>(p.kv_heads, 1), ", at least one, is needed");
  if (!std::isfinite(p.scale) || p.scale <= 0)
    return invalid_argument("landmark: scale = ", p.scale, "; a finite number > 0 is needed");
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("landmark"));
  if (p.state_lengths.empty()) return {};
  if (static_cast<std::int64_t>(p.state_lengths.size()) != p.sequences())
    return invalid_argument("landmark: state length has ", p.state_lengths.size(), " entries for ",
                            p.sequences(), " sequences; one each is needed");
  for (std::size_t n = 0; n < p.state_lengths.size(); ++n)
    if (p.state_lengths[n] < 0 || p.state_lengths[n] > p.state_capacity)
      return invalid_argument("landmark: state length[", n, "] = ", p.state_lengths[n],
                              "; 0 to the ", p.state_capacity, " rows of the cache are allowed");
  return {};
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

Status validate(const Retrieval& r) {
  if (r.block < 2 || r.block > kMostBlock)
    return invalid_argument("landmark: block = ", r.block, "; 2 to ", kMostBlock,
                            " tokens are allowed, the landmark included");
  if (r.top_k < 0 || r.window < 0 || r.max_blocks < 0 || r.top_k > kMostBlocks ||
      r.window > kMostBlocks || r.max_blocks > kMostBlocks)
    return invalid_argument("landmark: top_k = ", r.top_k, ", window = ", r.window,
                            ", max_blocks = ", r.max_blocks, "; 0 to ", kMostBlocks,
                            " blocks are allowed (top_k and max_blocks: 0 is all)");
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
