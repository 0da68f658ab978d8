#include "kernels/attention_shapes.h"

#include <algorithm>
#include <vector>

namespace everlong {
namespace {

using Shape = std::span<const std::int64_t>;

Status check_cache(std::string_view room, const char* name, Shape shape, std::int64_t sequences,
                   std::int64_t kv_heads, std::int64_t dim) {
  if (shape.size() != 4 || shape[0] != sequences || shape[2] != kv_heads || shape[3] != dim)
    return invalid_argument(room, ": state ", name, " has shape ", brackets(shape), "; [",
                            sequences, ", rows, ", kv_heads, ", ", dim,
                            "] is needed: sequences, rows, heads, dim");
  return {};
}

}  // namespace

std::string brackets(Shape shape) {
  std::vector<std::string> sizes;
  for (const auto size : shape) sizes.push_back(cat(size));
  return cat("[", join(sizes, ", "), "]");
}

Result<AttentionSizes> attention_sizes(std::string_view room, Shape q, Shape k, Shape v) {
  if (q.size() != 4 || k.size() != 4 || v.size() != 4)
    return invalid_argument(room, ": q, k, v have shapes ", brackets(q), ", ", brackets(k), ", ",
                            brackets(v), "; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1])
    return invalid_argument(room, ": q, k, v have ", q[0], ", ", k[0], ", ", v[0], " rows of ",
                            q[1], ", ", k[1], ", ", v[1],
                            " tokens; batch and tokens must agree (past keys come in the state)");
  if (k[3] != q[3])
    return invalid_argument(room, ": the key dim of q is ", q[3], " and that of k ", k[3],
                            "; they must agree (v may differ)");
  if (k[2] != v[2])
    return invalid_argument(room, ": k has ", k[2], " heads and v ", v[2], "; they must agree");
  return AttentionSizes{q[0], q[1], q[2], k[2], q[3], v[3]};
}

Status check_sizes(std::string_view room, const AttentionSizes& s) {
  if (s.batch < 1 || s.tokens < 0)
    return invalid_argument(room, ": batch ", s.batch, " of ", s.tokens,
                            " tokens; at least one row is needed (no tokens in it are legal)");
  if (s.key_dim < 1 || s.value_dim < 1)
    return invalid_argument(room, ": key dim ", s.key_dim, " and value dim ", s.value_dim,
                            "; both must be >= 1");
  if (s.kv_heads < 1 || s.heads < 1 || s.heads % s.kv_heads != 0)
    return invalid_argument(room, ": ", s.heads, " query heads cannot share ", s.kv_heads,
                            " key/value heads; a multiple of ",
                            std::max<std::int64_t>(s.kv_heads, 1), ", at least one, is needed");
  return {};
}

Result<std::int64_t> cache_rows(std::string_view room, Shape k, Shape v, std::int64_t sequences,
                                const AttentionSizes& sizes) {
  if (k.empty() && v.empty()) return 0;
  EVERLONG_RETURN_IF_ERROR(check_cache(room, "k", k, sequences, sizes.kv_heads, sizes.key_dim));
  EVERLONG_RETURN_IF_ERROR(check_cache(room, "v", v, sequences, sizes.kv_heads, sizes.value_dim));
  if (k[1] != v[1])
    return invalid_argument(room, ": state k has ", k[1], " rows and state v ", v[1],
                            "; they must agree");
  return k[1];
}

Status check_cache_lengths(std::string_view room, std::span<const std::int64_t> lengths,
                           std::int64_t sequences, std::int64_t capacity) {
  if (lengths.empty()) return {};
  if (static_cast<std::int64_t>(lengths.size()) != sequences)
    return invalid_argument(room, ": state length has ", lengths.size(), " entries for ", sequences,
                            " sequences; one each is needed");
  for (std::size_t n = 0; n < lengths.size(); ++n)
    if (lengths[n] < 0 || lengths[n] > capacity)
      return invalid_argument(room, ": state length[", n, "] = ", lengths[n], "; 0 to the ",
                              capacity, " rows of the cache are allowed");
  return {};
}

}  // namespace everlong
