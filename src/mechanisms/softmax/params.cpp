#include "mechanisms/softmax/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"

namespace everlong::softmax {
namespace {

std::string brackets(Shape shape) {
  std::vector<std::string> sizes;
  for (const auto size : shape) sizes.push_back(cat(size));
  return cat("[", join(sizes, ", "), "]");
}

Status check_cache(const char* name, Shape shape, std::int64_t dim, Params& params) {
  if (shape.size() != 4 || shape[0] != params.sequences() || shape[2] != params.kv_heads ||
      shape[3] != dim)
    return invalid_argument("softmax: state ", name, " has shape ", brackets(shape), "; [",
                            params.sequences(), ", rows, ", params.kv_heads, ", ", dim,
                            "] is needed: sequences, rows, heads, dim");
  return {};
}

}  // namespace

std::int64_t Params::kept(std::int64_t n) const {
  const std::int64_t all = past(n) + length(n);
  return window > 0 ? std::min(all, window - 1) : all;
}

Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params) {
  if (q.size() != 4 || k.size() != 4 || v.size() != 4)
    return invalid_argument("softmax: q, k, v have shapes ", brackets(q), ", ", brackets(k), ", ",
                            brackets(v), "; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1])
    return invalid_argument("softmax: q, k, v have ", q[0], ", ", k[0], ", ", v[0], " rows of ",
                            q[1], ", ", k[1], ", ", v[1],
                            " tokens; batch and tokens must agree (past keys come in the state)");
  if (k[3] != q[3])
    return invalid_argument("softmax: the key dim of q is ", q[3], " and that of k ", k[3],
                            "; they must agree (v may differ)");
  if (k[2] != v[2])
    return invalid_argument("softmax: k has ", k[2], " heads and v ", v[2], "; they must agree");
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
    return invalid_argument("softmax: state k has ", state_k[1], " rows and state v ", state_v[1],
                            "; they must agree");
  params.state_capacity = state_k[1];
  return {};
}

Status validate(const Params& p) {
  if (p.batch < 1 || p.tokens < 0)
    return invalid_argument("softmax: batch ", p.batch, " of ", p.tokens,
                            " tokens; at least one row is needed (no tokens in it are legal)");
  if (p.key_dim < 1 || p.value_dim < 1)
    return invalid_argument("softmax: key dim ", p.key_dim, " and value dim ", p.value_dim,
                            "; both must be >= 1");
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0)
    return invalid_argument("softmax: ", p.heads, " query heads cannot share ", p.kv_heads,
                            " key/value heads; a multiple of ",
                            std::max<std::int64_t>(p.kv_heads, 1), ", at least one, is needed");
  if (p.window < 0)
    return invalid_argument("softmax: window = ", p.window,
                            "; tokens seen (>= 1, itself included) or 0 for all");
  if (!std::isfinite(p.scale) || p.scale <= 0)
    return invalid_argument("softmax: scale = ", p.scale, "; a finite number > 0 is needed");
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("softmax"));
  if (p.state_lengths.empty()) return {};
  if (static_cast<std::int64_t>(p.state_lengths.size()) != p.sequences())
    return invalid_argument("softmax: state length has ", p.state_lengths.size(), " entries for ",
                            p.sequences(), " sequences; one each is needed");
  for (std::size_t n = 0; n < p.state_lengths.size(); ++n)
    if (p.state_lengths[n] < 0 || p.state_lengths[n] > p.state_capacity)
      return invalid_argument("softmax: state length[", n, "] = ", p.state_lengths[n],
                              "; 0 to the ", p.state_capacity, " rows of the cache are allowed");
  return {};
}

double default_scale(std::int64_t key_dim) { return 1.0 / std::sqrt(static_cast<double>(key_dim)); }

double visible_pairs(std::int64_t past, std::int64_t tokens, std::int64_t window) {
  // The sum over t < tokens of min(past + t + 1, window): a ramp, then flat.
  const auto ramp = [](double from, double count) {
    return count * from + count * (count - 1) / 2;
  };
  const double first = static_cast<double>(past) + 1, count = static_cast<double>(tokens);
  if (window <= 0) return ramp(first, count);
  const double rising = std::clamp(static_cast<double>(window) - first, 0.0, count);
  return ramp(first, rising) + (count - rising) * static_cast<double>(window);
}

}  // namespace everlong::softmax
