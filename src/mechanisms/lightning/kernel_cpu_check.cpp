#include "mechanisms/lightning/kernel_cpu_check.h"

#include <algorithm>

#include "mechanisms/lightning/kernel.h"

namespace everlong::lightning::cpu {
namespace {

std::string describe(const ConstTensorView& x) {
  return cat(info(x.dtype).name, " [", x.sizes[0], ", ", x.sizes[1], ", ", x.sizes[2], ", ",
             x.sizes[3], "]");
}

}  // namespace

Status check_view(const char* name, const ConstTensorView& x, DType dtype,
                  const std::array<std::int64_t, 4>& sizes) {
  if (x.dtype != dtype || x.sizes != sizes)
    return invalid_argument("lightning: ", name, " is ", describe(x), "; ",
                            describe({nullptr, dtype, sizes, {}}), " is needed");
  const bool empty = std::ranges::find(sizes, 0) != sizes.end();
  if (x.data == nullptr && !empty) return invalid_argument("lightning: ", name, " is absent");
  if (x.strides[3] != 1 && sizes[3] > 1)
    return unsupported("lightning: the last dimension of ", name, " has stride ", x.strides[3],
                       "; the CPU kernel needs 1");
  return {};
}
Status check_optional(const char* name, const ConstTensorView& x, DType dtype,
                      const std::array<std::int64_t, 4>& sizes) {
  return x ? check_view(name, x, dtype, sizes) : Status();
}

Result<Problem> check_inputs(const ConstTensorView& q, const ConstTensorView& k,
                             const ConstTensorView& v, const ConstTensorView& state,
                             std::span<const std::int64_t> cu_seqlens,
                             std::span<const double> slope, double scale) {
  Problem p;
  p.shape = {.batch = q.sizes[0],
             .tokens = q.sizes[1],
             .heads = q.sizes[2],
             .key_dim = q.sizes[3],
             .value_dim = v.sizes[3],
             .cu_seqlens = cu_seqlens};
  p.dtype = q.dtype;
  EVERLONG_RETURN_IF_ERROR(validate(p.shape, slope, scale));
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kBFloat16)
    return unsupported("lightning: q is ", describe(q), "; the CPU kernel takes fp32 and bf16");
  if (p.shape.key_dim > kMaxDim || p.shape.value_dim > kMaxDim)
    return unsupported("lightning: key dim ", p.shape.key_dim, " and value dim ", p.shape.value_dim,
                       "; the CPU kernel takes up to ", kMaxDim);
  p.keys = {p.shape.batch, p.shape.tokens, p.shape.heads, p.shape.key_dim};
  p.values = {p.shape.batch, p.shape.tokens, p.shape.heads, p.shape.value_dim};
  p.states = {p.shape.sequences(), p.shape.heads, p.shape.key_dim, p.shape.value_dim};
  EVERLONG_RETURN_IF_ERROR(check_view("q", q, p.dtype, p.keys));
  EVERLONG_RETURN_IF_ERROR(check_view("k", k, p.dtype, p.keys));
  EVERLONG_RETURN_IF_ERROR(check_view("v", v, p.dtype, p.values));
  EVERLONG_RETURN_IF_ERROR(check_optional("the state", state, DType::kFloat32, p.states));
  return p;
}

}  // namespace everlong::lightning::cpu
