#include "mechanisms/landmark/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mechanisms/landmark/kernel.h"
#include "ops/kernel_call.h"
#include "ops/parallel.h"

namespace everlong::landmark {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Text {
  std::vector<Section> sections;
  std::vector<std::int64_t> first_section;
  double scale = 1;
  bool drop_empty = false;

  KernelCall call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    return {input_view(q), input_view(k), input_view(v), sections,
            first_section, scale,         drop_empty};
  }
};

Text text_of(const at::Tensor& marks_BS, double scale, bool drop_empty) {
  const at::Tensor marks = marks_BS.to(at::kByte).contiguous();
  Text text{{}, {0}, scale, drop_empty};
  for (std::int64_t b = 0; b < marks.size(0); ++b) {
    const auto row = sections_of({marks.const_data_ptr<std::uint8_t>() + b * marks.size(1),
                                  static_cast<std::size_t>(marks.size(1))});
    text.sections.insert(text.sections.end(), row.begin(), row.end());
    text.first_section.push_back(static_cast<std::int64_t>(text.sections.size()));
  }
  return text;
}

struct KernelFunction : torch::autograd::Function<KernelFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q_BTHK,
                               const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                               const Text& text) {
    const at::Tensor q = with_plain_rows(q_BTHK), k = with_plain_rows(k_BSGK),
                     v = with_plain_rows(v_BSGV);
    const std::int64_t B = q.size(0), T = q.size(1), H = q.size(2);
    const at::Tensor out = at::empty({B, T, H, v.size(3)}, q.options());
    const at::Tensor lse = at::empty({B, H, T}, q.options().dtype(at::kFloat));
    const KernelCall call = text.call(q, k, v);
    const Executor& threads = torch_executor();
    const Workspace workspace(forward_workspace_bytes(call, threads.threads()));
    throw_if_error(
        landmark::forward(call, output_view(out), output_view(lse), workspace.bytes(), threads));
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["text"] = hold(text);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3];
    const auto text = held<Text>(ctx->saved_data["text"]);
    const at::Tensor grad_o = grads[0].defined() ? with_plain_rows(grads[0]) : at::zeros_like(out);
    const at::Tensor grad_lse =
        grads[1].defined() ? grads[1].to(at::kFloat).contiguous() : at::Tensor();
    const at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
                     dv = at::empty(v.sizes(), v.options());
    const KernelCall call = text.call(q, k, v);
    const KernelGrads by_name{input_view(out),      input_view(saved[4]), input_view(grad_o),
                              input_view(grad_lse), output_view(dq),      output_view(dk),
                              output_view(dv)};
    const Executor& threads = torch_executor();
    const Workspace workspace(backward_workspace_bytes(call, threads.threads()));
    throw_if_error(landmark::backward(call, by_name, workspace.bytes(), threads));
    return {dq, dk, dv, {}};
  }
};

}  // namespace

Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (!q.is_cpu() || !k.is_cpu() || !v.is_cpu() || q.dim() != 4 || k.dim() != 4 || v.dim() != 4)
    return unsupported("landmark: the CPU kernel was given tensors on ", q.device().str(), ", ",
                       k.device().str(), ", ", v.device().str(), "; it takes [B, T, H, D] on cpu");
  if ((q.scalar_type() != at::kFloat && q.scalar_type() != at::kBFloat16) ||
      k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type())
    return unsupported("landmark: the CPU kernel was given ", q.scalar_type(), ", ",
                       k.scalar_type(), ", ", v.scalar_type(),
                       "; it takes fp32 or bf16, one for q, k and v (fp64: form composite)");
  KernelCall call;
  for (auto [view, tensor] : {std::pair(&call.q, &q), {&call.k, &k}, {&call.v, &v}}) {
    view->dtype = dtype_of(*tensor);
    view->sizes = {1, 1, 1, tensor->size(3)};
    view->strides = {0, 0, 0, 1};
  }
  return check_kernel_call(call);
}

Attended attention_by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& marks, double scale, bool drop_empty) {
  const auto result = KernelFunction::apply(q, k, v, text_of(marks, scale, drop_empty));
  return {result[0], result[1]};
}

}  // namespace everlong::landmark
