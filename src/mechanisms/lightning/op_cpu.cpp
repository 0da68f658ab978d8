#include "mechanisms/lightning/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mechanisms/lightning/kernel.h"
#include "ops/kernel_call.h"
#include "ops/parallel.h"

namespace everlong::lightning {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::int64_t workspace_bytes(const Tensor& q, const Tensor& v, int threads) {
  return static_cast<std::int64_t>(cpu::workspace_bytes(q.size(2), q.size(3), v.size(3), threads));
}

struct Call {
  Decay decay;
  std::vector<std::int64_t> cu_seqlens;
  bool has_state = false;  // else: zero, and the tensor is a placeholder
};

Attention run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const Call& call) {
  const std::int64_t N =
      call.cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(call.cu_seqlens.size()) - 1;
  const Attention result{
      at::empty(v.sizes(), v.options()),
      at::empty({N, q.size(2), q.size(3), v.size(3)}, q.options().dtype(at::kFloat))};
  const cpu::ForwardArgs args{.q_BTHK = input_view(q),
                              .k_BTHK = input_view(k),
                              .v_BTHV = input_view(v),
                              .o_BTHV = output_view(result.o_BTHV),
                              .state_NHKV = call.has_state ? input_view(state) : ConstTensorView(),
                              .state_out_NHKV = output_view(result.state_NHKV),
                              .cu_seqlens = call.cu_seqlens,
                              .slope = call.decay.slope(),
                              .scale = call.decay.scale()};
  const Executor& executor = torch_executor();
  if (q.size(1) == 1 && call.cu_seqlens.empty()) {
    throw_if_error(cpu::step(args, executor));
  } else {
    const Workspace workspace(workspace_bytes(q, v, executor.threads()));
    throw_if_error(cpu::forward(args, workspace.bytes(), executor));
  }
  return result;
}

struct KernelFunction : torch::autograd::Function<KernelFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& state, const Call& call) {
    const Attention result = run_forward(q, k, v, state, call);
    ctx->save_for_backward({q, k, v, state});
    ctx->saved_data["call"] = hold(call);
    ctx->set_materialize_grads(false);
    return {result.o_BTHV, result.state_NHKV};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Call call = held<Call>(ctx->saved_data["call"]);
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &state = saved[3];
    const Tensor grad_o = with_plain_rows(grads[0].defined() ? grads[0] : at::zeros_like(v));
    const Tensor grad_state = with_plain_rows(grads[1]);
    variable_list out(5);
    const auto wanted = [&](std::size_t index, const Tensor& like) {
      if (ctx->needs_input_grad(index)) out[index] = at::empty(like.sizes(), like.options());
      return output_view(out[index]);
    };
    const Executor& executor = torch_executor();
    const Workspace workspace(workspace_bytes(q, v, executor.threads()));
    throw_if_error(
        cpu::backward({.q_BTHK = input_view(q),
                       .k_BTHK = input_view(k),
                       .v_BTHV = input_view(v),
                       .state_NHKV = call.has_state ? input_view(state) : ConstTensorView(),
                       .grad_o_BTHV = input_view(grad_o),
                       .grad_state_NHKV = input_view(grad_state),
                       .grad_q_BTHK = wanted(0, q),
                       .grad_k_BTHK = wanted(1, k),
                       .grad_v_BTHV = wanted(2, v),
                       .grad_state_in_NHKV = wanted(3, state),
                       .cu_seqlens = call.cu_seqlens,
                       .slope = call.decay.slope(),
                       .scale = call.decay.scale()},
                      workspace.bytes(), executor));
    return out;
  }
};

}  // namespace

Status check_cpu_kernel(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* x : {&q, &k, &v})
    if (!x->is_cpu() || (x->scalar_type() != at::kFloat && x->scalar_type() != at::kBFloat16))
      return unsupported("lightning: the CPU kernel was given ", x->scalar_type(), " on ",
                         x->device(), "; it takes fp32 and bf16 on the CPU (else: composite)");
  if (q.size(3) > cpu::kMaxDim || v.size(3) > cpu::kMaxDim)
    return unsupported("lightning: the CPU kernel was given key dim ", q.size(3), " and value dim ",
                       v.size(3), "; it takes up to ", cpu::kMaxDim, " (else: composite)");
  return {};
}

Attention attention_by_cpu_kernel(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                  const Decay& decay, at::IntArrayRef cu_seqlens,
                                  const std::optional<Tensor>& state_in) {
  const Tensor q = with_plain_rows(q_in), k = with_plain_rows(k_in), v = with_plain_rows(v_in);
  const Tensor state = state_in.has_value() ? with_plain_rows(state_in->to(at::kFloat))
                                            : at::empty({0}, q.options().dtype(at::kFloat));
  const Call call{decay, cu_seqlens.vec(), state_in.has_value()};
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || state.requires_grad());
  if (!differentiate) return run_forward(q, k, v, state, call);
  const auto results = KernelFunction::apply(q, k, v, state, call);
  return {results[0], results[1]};
}

}  // namespace everlong::lightning
