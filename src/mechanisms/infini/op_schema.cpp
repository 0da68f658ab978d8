#include <ATen/ops/empty.h>

#include "mechanisms/infini/op.h"
#include "ops/schema.h"

namespace everlong::infini {
namespace {

using at::Tensor;

Tensor compute(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
               std::int64_t segment, c10::string_view update, c10::string_view rope,
               double rope_theta, std::optional<double> scale) {
  Options options;
  options.segment = segment;
  options.rope_theta = rope_theta;
  options.scale = scale.value_or(0);
  const std::string rule(update), pairs(rope);
  TORCH_CHECK_VALUE(rule == "linear" || rule == "delta", "infini: update = \"", rule,
                    "\"; linear or delta");
  TORCH_CHECK_VALUE(pairs == "half_split" || pairs == "interleaved" || pairs == "none",
                    "infini: rope = \"", pairs, "\"; half_split, interleaved or none");
  options.update = rule == "delta" ? Update::kDelta : Update::kLinear;
  options.rope = pairs == "none"          ? Rope::kNone
                 : pairs == "interleaved" ? Rope::kInterleaved
                                          : Rope::kHalfSplit;
  return infini_attention(q, k, v, beta, {}, {}, options).out_BTHV;
}

Tensor shapes(const Tensor& q, const Tensor&, const Tensor& v, const Tensor&, std::int64_t,
              c10::string_view, c10::string_view, double, std::optional<double>) {
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

}  // namespace

void register_schemas() {
  define_operator(
      "infini_attention(Tensor q, Tensor k, Tensor v, Tensor beta, int segment, str "
      "update=\"linear\", str rope=\"half_split\", float rope_theta=10000., float? scale=None) -> "
      "Tensor",
      compute, shapes);
}

}  // namespace everlong::infini
