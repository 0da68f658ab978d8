#include <ATen/ops/empty.h>

#include "mechanisms/landmark/op.h"
#include "ops/schema.h"

namespace everlong::landmark {
namespace {

using at::Tensor;

Tensor compute(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& marks,
               std::optional<double> scale, bool drop_empty) {
  return attention(q, k, v, marks, {.scale = scale, .drop_empty = drop_empty}).out;
}

Tensor shapes(const Tensor& q, const Tensor&, const Tensor& v, const Tensor&, std::optional<double>,
              bool) {
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

}  // namespace

void register_schemas() {
  define_operator(
      "landmark_attention(Tensor q, Tensor k, Tensor v, Tensor marks, float? scale=None, "
      "bool drop_empty=False) -> Tensor",
      compute, shapes);
}

}  // namespace everlong::landmark
