// Between tensors and torch-free kernels: what every room's op around a kernel needs.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/custom_class.h>
#include <ATen/core/ivalue.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "core/tensor_view.h"

namespace everlong {

// fp32, bf16 or fp16; anything else counts as fp64, which kernels refuse themselves.
DType dtype_of(const at::Tensor& x);

// Views of up to four dimensions, missing ones in front of size 1. An undefined tensor gives an
// empty view. The tensor must outlive the view.
ConstTensorView input_view(const at::Tensor& x);
TensorView output_view(const at::Tensor& x);

// The same values with contiguous rows (the last dimension), copied where they are not. Undefined
// stays undefined.
at::Tensor with_plain_rows(const at::Tensor& x);

// The same values, of two bytes each, with contiguous rows (the last dimension) that begin on
// borders of 16 bytes and follow each other forwards: what copy engines and wide loads can walk
// through. Copied where they do not.
at::Tensor with_aligned_rows(const at::Tensor& x);

// Memory for one call of a kernel on the CPU, contents undefined.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes);
  std::span<std::byte> bytes() const;

 private:
  at::Tensor memory_;
};

// Whatever an autograd function keeps between forward and backward besides tensors:
//   ctx->saved_data["call"] = hold(call)      held<Call>(ctx->saved_data["call"])
template <class Call>
struct CallHolder : torch::CustomClassHolder {
  explicit CallHolder(Call call_in) : call(std::move(call_in)) {}
  Call call;
};
template <class Call>
c10::IValue hold(Call call) {
  return c10::IValue::make_capsule(c10::make_intrusive<CallHolder<Call>>(std::move(call)));
}
template <class Call>
Call held(const c10::IValue& value) {
  const auto capsule = value.toCapsule();
  return static_cast<const CallHolder<Call>&>(*capsule).call;
}

}  // namespace everlong
