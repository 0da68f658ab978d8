#include <ATen/ATen.h>

#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/params.h"
#include "ops/describe.h"

namespace everlong::lightning {
namespace {

Status check_input(const char* name, const at::Tensor& x, const at::Tensor& q) {
  if (!x.defined() || x.dim() != 4)
    return invalid_argument("lightning: ", name, " is ", describe(x), "; [B, T, H, D] is needed");
  if (!x.is_floating_point())
    return invalid_argument("lightning: ", name, " is ", describe(x),
                            "; a floating dtype is needed");
  if (x.scalar_type() != q.scalar_type() || x.device() != q.device())
    return invalid_argument("lightning: ", name, " is ", describe(x), " on ", x.device(),
                            " and q is ", describe(q), " on ", q.device(),
                            "; one dtype and one device are needed");
  if (x.size(0) != q.size(0) || x.size(1) != q.size(1) || x.size(2) != q.size(2))
    return invalid_argument(
        "lightning: ", name, " is ", describe(x), " and q is ", describe(q),
        "; batch, tokens and heads must be the same (repeat grouped heads first)");
  return {};
}

}  // namespace

Status check_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const Decay& decay, at::IntArrayRef cu_seqlens,
                       const std::optional<at::Tensor>& state) {
  EVERLONG_RETURN_IF_ERROR(check_input("q", q, q));
  EVERLONG_RETURN_IF_ERROR(check_input("k", k, q));
  EVERLONG_RETURN_IF_ERROR(check_input("v", v, q));
  if (k.size(3) != q.size(3))
    return invalid_argument("lightning: k is ", describe(k), " and q is ", describe(q),
                            "; one key dim is needed");
  const Shape shape{.batch = q.size(0),
                    .tokens = q.size(1),
                    .heads = q.size(2),
                    .key_dim = q.size(3),
                    .value_dim = v.size(3),
                    .cu_seqlens = {cu_seqlens.data(), cu_seqlens.size()}};
  EVERLONG_RETURN_IF_ERROR(validate(shape, decay.slope(), decay.scale()));
  if (!state.has_value()) return {};
  const std::vector<std::int64_t> wanted = {shape.sequences(), shape.heads, shape.key_dim,
                                            shape.value_dim};
  if (!state->defined() || state->sizes() != at::IntArrayRef(wanted) || !state->is_floating_point())
    return invalid_argument("lightning: the initial state is ", describe(*state),
                            "; a floating dtype and ", at::IntArrayRef(wanted),
                            " = [sequences, H, K, V] are needed");
  if (state->device() != q.device())
    return invalid_argument("lightning: the initial state is on ", state->device(), " and q is on ",
                            q.device(), "; one device is needed");
  return {};
}

}  // namespace everlong::lightning
