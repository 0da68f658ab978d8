#include "mechanisms/softmax/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"
#include "kernels/attention_shapes.h"

namespace everlong::softmax {
std::int64_t Params::kept(std::int64_t n) const {
  const std::int64_t all = past(n) + length(n);
  return window > 0 ? std::min(all, window - 1) : all;
}

Status read_shapes(Shape q, Shape k, Shape v, Shape state_k, Shape state_v, Params& params) {
  EVERLONG_ASSIGN(const AttentionSizes sizes, attention_sizes("softmax", q, k, v));
  sizes.put_into(params);
  EVERLONG_ASSIGN(const std::int64_t rows,
                  cache_rows("softmax", state_k, state_v, params.sequences(), sizes));
  if (!state_k.empty()) params.state_capacity = rows;
  return {};
}

Status validate(const Params& p) {
  EVERLONG_RETURN_IF_ERROR(check_sizes("softmax", AttentionSizes::of(p)));
  if (p.window < 0)
    return invalid_argument("softmax: window = ", p.window,
                            "; tokens seen (>= 1, itself included) or 0 for all");
  if (!std::isfinite(p.scale) || p.scale <= 0)
    return invalid_argument("softmax: scale = ", p.scale, "; a finite number > 0 is needed");
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("softmax"));
  return check_cache_lengths("softmax", p.state_lengths, p.sequences(), p.state_capacity);
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
