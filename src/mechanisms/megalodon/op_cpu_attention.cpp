#include "mechanisms/megalodon/op_cpu_attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/megalodon/kernel_attention.h"
#include "mechanisms/megalodon/op_rows.h"
#include "ops/kernel_call.h"
#include "ops/operator.h"
#include "ops/parallel.h"

namespace everlong::megalodon {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_in, const at::Tensor& k_in,
                            const at::Tensor& v_in) {
    const at::Tensor q = with_plain_rows(q_in), k = with_plain_rows(k_in),
                     v = with_plain_rows(v_in);
    const AttentionCall call{input_view(q), input_view(k), input_view(v)};
    const at::Tensor o = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
    const at::Tensor lse =
        at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
    const Executor& threads = torch_executor();
    const Workspace workspace(attention_forward_bytes(call, threads.threads()));
    throw_if_error(
        attention_forward(call, output_view(o), output_view(lse), workspace.bytes(), threads));
    ctx->save_for_backward({q, k, v, o, lse});
    return o;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const at::Tensor grad_o = with_plain_rows(given[0]);
    const auto like = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
    const at::Tensor dq = like(q), dk = like(k), dv = like(v);
    const AttentionCall call{input_view(q), input_view(k), input_view(v)};
    const AttentionGrads grads{input_view(saved[3]), input_view(saved[4]), input_view(grad_o),
                               output_view(dq),      output_view(dk),      output_view(dv)};
    const Executor& threads = torch_executor();
    const Workspace workspace(attention_backward_bytes(call, threads.threads()));
    throw_if_error(attention_backward(call, grads, workspace.bytes(), threads));
    return {dq, dk, dv};
  }
};

}  // namespace

Status check_attention_kernel(const at::Tensor& q) {
  if (!q.is_cpu() || (q.scalar_type() != at::kFloat && q.scalar_type() != at::kBFloat16))
    return unsupported("megalodon: the attention kernel was given ", q.scalar_type(), " on ",
                       q.device().str(), "; it takes fp32 or bf16 on cpu (else: form composite)");
  if (q.size(-1) > cpu::kMostDim)
    return unsupported("megalodon: a key dim of ", q.size(-1),
                       "; the attention kernel takes up to ", cpu::kMostDim);
  return {};
}

at::Tensor attend_by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  // With one key there is no choice, and the gradient of the scores is 0 to the last bit.
  return k.size(1) == 1 ? attend_composite(q, k, v) : AttentionFunction::apply(q, k, v);
}

}  // namespace everlong::megalodon
