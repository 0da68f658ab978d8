#include <ATen/ops/empty.h>

#include "mechanisms/longnet/op.h"
#include "ops/schema.h"

namespace everlong::longnet {
namespace {

using at::Tensor;

Tensor compute(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef segment_length,
               at::IntArrayRef dilated_ratio, bool causal, std::optional<double> scale,
               at::IntArrayRef cu_seqlens) {
  Options options;
  options.scale = scale;
  auto patterns = make_patterns(segment_length, dilated_ratio);
  throw_if_error(patterns.status());
  options.geometry.patterns = std::move(patterns).value();
  options.geometry.causal = causal;
  return cu_seqlens.empty() ? attention(q, k, v, options)
                            : attention_packed(q, k, v, cu_seqlens, options);
}

Tensor shapes(const Tensor& q, const Tensor&, const Tensor& v, at::IntArrayRef, at::IntArrayRef,
              bool, std::optional<double>, at::IntArrayRef) {
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

}  // namespace

void register_schemas() {
  define_operator(
      "dilated_attention(Tensor q, Tensor k, Tensor v, int[] segment_length, int[] dilated_ratio, "
      "bool causal=True, float? scale=None, int[] cu_seqlens=[]) -> Tensor",
      compute, shapes);
}

}  // namespace everlong::longnet
