#include <ATen/ops/empty.h>

#include "mechanisms/softmax/op.h"
#include "ops/schema.h"

namespace everlong::softmax {
namespace {

using at::Tensor;

Tensor compute(const Tensor& q, const Tensor& k, const Tensor& v, std::int64_t window,
               std::optional<double> scale, at::IntArrayRef cu_seqlens) {
  const Options options{.window = window, .scale = scale};
  return cu_seqlens.empty() ? attention(q, k, v, options)
                            : attention_packed(q, k, v, cu_seqlens, options);
}

Tensor shapes(const Tensor& q, const Tensor&, const Tensor& v, std::int64_t, std::optional<double>,
              at::IntArrayRef) {
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

}  // namespace

void register_schemas() {
  define_operator(
      "causal_attention(Tensor q, Tensor k, Tensor v, int window=0, float? scale=None, "
      "int[] cu_seqlens=[]) -> Tensor",
      compute, shapes);
}

}  // namespace everlong::softmax
