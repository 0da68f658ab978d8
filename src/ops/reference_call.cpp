#include "ops/reference_call.h"

#include <ATen/ATen.h>

namespace everlong {

std::vector<double> to_doubles(const at::Tensor& x) {
  if (!x.defined()) return {};
  const at::Tensor flat = x.detach().to(at::kCPU, at::kDouble).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

at::Tensor from_doubles(const std::vector<double>& values, at::IntArrayRef sizes) {
  return at::tensor(values, at::kDouble).view(sizes);
}

Result<std::vector<double>> incoming_gradient(const OpCall& call, const std::string& name,
                                              at::IntArrayRef sizes, std::string_view room) {
  const auto found = call.grad_out.find(name);
  if (found == call.grad_out.end()) return std::vector<double>();
  if (found->second.sizes() != sizes)
    return invalid_argument(room, ": grad_out of ", name, " has shape ", found->second.sizes(),
                            "; ", sizes, " is needed");
  return to_doubles(found->second);
}

Status require_reference_input(const at::Tensor& x, std::string_view room, std::string_view form) {
  if (x.scalar_type() == at::kDouble && x.is_cpu()) return {};
  return unsupported(room, ": form ", form, " takes fp64 on the CPU; q is ", x.scalar_type(),
                     " on ", x.device());
}

std::int64_t sequences_of(const OpShape& shape) {
  return shape.cu_seqlens.empty() ? shape.batch
                                  : static_cast<std::int64_t>(shape.cu_seqlens.size()) - 1;
}

}  // namespace everlong
