#include "ops/kernel_call.h"

#include <ATen/ATen.h>

namespace everlong {
namespace {

template <class View, class Pointer>
View view_of(const at::Tensor& x, Pointer data) {
  View view;
  view.data = data;
  view.dtype = dtype_of(x);
  const std::size_t missing = view.sizes.size() - static_cast<std::size_t>(x.dim());
  for (std::size_t i = 0; i < view.sizes.size(); ++i) {
    const bool own = i >= missing;
    const auto dim = static_cast<std::int64_t>(i - (own ? missing : 0));
    view.sizes[i] = own ? x.size(dim) : 1;
    view.strides[i] = own ? x.stride(dim) : 0;
  }
  return view;
}

}  // namespace

DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      return DType::kFloat64;
  }
}

ConstTensorView input_view(const at::Tensor& x) {
  return x.defined() ? view_of<ConstTensorView>(x, x.const_data_ptr()) : ConstTensorView();
}
TensorView output_view(const at::Tensor& x) {
  return x.defined() ? view_of<TensorView>(x, x.mutable_data_ptr()) : TensorView();
}

at::Tensor with_plain_rows(const at::Tensor& x) {
  return !x.defined() || x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

at::Tensor with_aligned_rows(const at::Tensor& x) {
  bool fits = x.stride(-1) == 1 && reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (std::int64_t dim = 0; dim + 1 < x.dim(); ++dim)
    fits = fits && (x.size(dim) == 1 || (x.stride(dim) > 0 && x.stride(dim) % 8 == 0));
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

Workspace::Workspace(std::int64_t bytes) : memory_(at::empty({bytes}, at::kByte)) {}
std::span<std::byte> Workspace::bytes() const {
  return {static_cast<std::byte*>(memory_.mutable_data_ptr()), memory_.nbytes()};
}

}  // namespace everlong
