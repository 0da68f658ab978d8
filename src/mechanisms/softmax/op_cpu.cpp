#include "mechanisms/softmax/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mechanisms/softmax/kernel.h"
#include "ops/kernel_call.h"
#include "ops/operator.h"
#include "ops/parallel.h"

namespace everlong::softmax {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

KernelCall call_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   std::span<const std::int64_t> offsets, std::int64_t window, double scale) {
  return {input_view(q), input_view(k), input_view(v), offsets, window, scale};
}

struct KernelFunction : torch::autograd::Function<KernelFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_BTHK,
                            const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                            const std::vector<std::int64_t>& offsets, std::int64_t window,
                            double scale) {
    const at::Tensor q = with_plain_rows(q_BTHK), k = with_plain_rows(k_BSGK),
                     v = with_plain_rows(v_BSGV);
    const std::int64_t B = q.size(0), T = q.size(1), H = q.size(2);
    const at::Tensor out = at::empty({B, T, H, v.size(3)}, q.options());
    const at::Tensor lse = at::empty({B, H, T}, q.options().dtype(at::kFloat));
    const KernelCall call = call_of(q, k, v, offsets, window, scale);
    const Executor& threads = torch_executor();
    const Workspace workspace(forward_workspace_bytes(call, threads.threads()));
    throw_if_error(
        softmax::forward(call, output_view(out), output_view(lse), workspace.bytes(), threads));
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["offsets"] = offsets;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const auto offsets = ctx->saved_data["offsets"].toIntVector();
    const at::Tensor grad_o = with_plain_rows(grads[0]);
    const at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
                     dv = at::empty(v.sizes(), v.options());
    const KernelCall call = call_of(q, k, v, offsets, ctx->saved_data["window"].toInt(),
                                    ctx->saved_data["scale"].toDouble());
    const KernelGrads by_name{input_view(saved[3]), input_view(saved[4]), input_view(grad_o),
                              output_view(dq),      output_view(dk),      output_view(dv)};
    const Executor& threads = torch_executor();
    const Workspace workspace(backward_workspace_bytes(call, threads.threads()));
    throw_if_error(softmax::backward(call, by_name, workspace.bytes(), threads));
    return {dq, dk, dv, {}, {}, {}};
  }
};

}  // namespace

Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (!q.is_cpu() || !k.is_cpu() || !v.is_cpu() || q.dim() != 4 || k.dim() != 4 || v.dim() != 4)
    return unsupported("softmax: the CPU kernel was given tensors on ", q.device().str(), ", ",
                       k.device().str(), ", ", v.device().str(), "; it takes [B, T, H, D] on cpu");
  if ((q.scalar_type() != at::kFloat && q.scalar_type() != at::kBFloat16) ||
      k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type())
    return unsupported("softmax: the CPU kernel was given ", q.scalar_type(), ", ", k.scalar_type(),
                       ", ", v.scalar_type(),
                       "; it takes fp32 or bf16, one for q, k and v (fp64: form composite)");
  KernelCall call;
  for (auto [view, tensor] : {std::pair(&call.q, &q), {&call.k, &k}, {&call.v, &v}}) {
    view->dtype = dtype_of(*tensor);
    view->sizes = {1, 1, 1, tensor->size(3)};
    view->strides = {0, 0, 0, 1};
  }
  return check_kernel_call(call);
}

at::Tensor attention_by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   std::span<const std::int64_t> offsets, std::int64_t window,
                                   double scale) {
  return KernelFunction::apply(q, k, v, std::vector<std::int64_t>(offsets.begin(), offsets.end()),
                               window, scale);
}

}  // namespace everlong::softmax
