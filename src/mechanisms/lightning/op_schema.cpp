#include <ATen/ops/empty.h>

#include <tuple>

#include "mechanisms/lightning/op.h"
#include "ops/schema.h"

namespace everlong::lightning {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> compute(const Tensor& q, const Tensor& k, const Tensor& v,
                                   at::ArrayRef<double> slope, double scale,
                                   at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state) {
  const Decay decay(slope.vec(), scale);
  auto result = decay_linear_attention(q, k, v, decay, cu_seqlens, state);
  return {std::move(result.o_BTHV), std::move(result.state_NHKV)};
}

std::tuple<Tensor, Tensor> shapes(const Tensor& q, const Tensor& k, const Tensor& v,
                                  at::ArrayRef<double> slope, double scale,
                                  at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state) {
  throw_if_error(check_arguments(q, k, v, Decay(slope.vec(), scale), cu_seqlens, state));
  const std::int64_t sequences =
      cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  const auto accumulator = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::empty(v.sizes(), v.options()),
          at::empty({sequences, q.size(2), q.size(3), v.size(3)}, v.options().dtype(accumulator))};
}

}  // namespace

void register_schemas() {
  define_operator(
      "decay_linear_attention(Tensor q, Tensor k, Tensor v, float[] slope, float scale=1.0, "
      "int[] cu_seqlens=[], Tensor? state=None) -> (Tensor o, Tensor state_out)",
      compute, shapes);
}

}  // namespace everlong::lightning
