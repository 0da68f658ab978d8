#include "mechanisms/infini/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/infini/kernel.h"
#include "ops/kernel_call.h"
#include "ops/operator.h"
#include "ops/parallel.h"

namespace everlong::infini {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ReadCall read_call_of(const at::Tensor& q, const at::Tensor& local, const at::Tensor& M,
                      const at::Tensor& z, const at::Tensor& gate, bool bypass) {
  return {input_view(q), input_view(local), input_view(M), input_view(z), input_view(gate), bypass};
}
// [P, G, K] and [P, C] as views of four dimensions hold their sizes at the end: kernels read them
// as contiguous.
WriteCall write_call_of(const at::Tensor& k, const at::Tensor& v, const at::Tensor& weight) {
  return {input_view(k), input_view(v),
          weight.numel() > 0 ? input_view(weight) : ConstTensorView()};
}

struct ReadFunction : torch::autograd::Function<ReadFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_in,
                            const at::Tensor& local_in, const at::Tensor& M_in,
                            const at::Tensor& z_in, const at::Tensor& gate_in, bool bypass) {
    const at::Tensor q = with_plain_rows(q_in), local = with_plain_rows(local_in),
                     M = M_in.contiguous(), z = z_in.contiguous(), gate = gate_in.contiguous();
    const at::Tensor out = at::empty(local.sizes(), q.options());
    const ReadCall call = read_call_of(q, local, M, z, gate, bypass);
    const Executor& threads = torch_executor();
    const Workspace workspace(read_workspace_bytes(call, threads.threads()));
    throw_if_error(read(call, output_view(out), workspace.bytes(), threads));
    ctx->save_for_backward({q, local, M, z, gate});
    ctx->saved_data["bypass"] = bypass;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &local = saved[1], &M = saved[2], &z = saved[3],
                     &gate = saved[4];
    const at::Tensor go = with_plain_rows(grads[0]);
    const at::Tensor dq = at::empty(q.sizes(), q.options()),
                     dlocal = at::empty(local.sizes(), q.options()),
                     dM = at::empty(M.sizes(), M.options()), dz = at::empty(z.sizes(), z.options()),
                     dgate = at::empty({q.size(0), q.size(2), local.size(3)}, M.options());
    const ReadCall call = read_call_of(q, local, M, z, gate, ctx->saved_data["bypass"].toBool());
    const ReadGrads by_name{input_view(go),  output_view(dq), output_view(dlocal),
                            output_view(dM), output_view(dz), output_view(dgate)};
    const Executor& threads = torch_executor();
    const Workspace workspace(read_workspace_bytes(call, threads.threads()));
    throw_if_error(read_backward(call, by_name, workspace.bytes(), threads));
    return {dq, dlocal, dM, dz, dgate.sum(0), {}};
  }
};

struct WriteFunction : torch::autograd::Function<WriteFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& k_in, const at::Tensor& v_in,
                               const at::Tensor& weight_in) {
    const at::Tensor k = with_plain_rows(k_in), v = with_plain_rows(v_in),
                     weight = weight_in.to(at::kFloat).contiguous();
    const std::int64_t P = k.size(0), G = k.size(2), K = k.size(3), V = v.size(3);
    const auto wide = k.options().dtype(at::kFloat);
    const at::Tensor M = at::empty({P, G, K, V}, wide), z = at::empty({P, G, K}, wide);
    const WriteCall call = write_call_of(k, v, weight);
    const Executor& threads = torch_executor();
    const Workspace workspace(write_workspace_bytes(call, threads.threads()));
    throw_if_error(write(call, output_view(M), output_view(z), workspace.bytes(), threads));
    ctx->save_for_backward({k, v, weight});
    return {M, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &k = saved[0], &v = saved[1], &weight = saved[2];
    const at::Tensor dM = grads[0].contiguous(), dz = grads[1].contiguous();
    const at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
    const WriteCall call = write_call_of(k, v, weight);
    const Executor& threads = torch_executor();
    const Workspace workspace(write_workspace_bytes(call, threads.threads()));
    throw_if_error(
        write_backward(call, {input_view(dM), input_view(dz), output_view(dk), output_view(dv)},
                       workspace.bytes(), threads));
    return {dk, dv, {}};
  }
};

}  // namespace

Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  for (const at::Tensor& x : {q, k, v}) {
    if (!x.is_cpu() || x.dim() != 4)
      return unsupported("infini: the CPU kernel was given ", x.dim(), " dimensions on ",
                         x.device().str(), "; it takes [B, T, H, D] on cpu");
    if ((x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) ||
        x.scalar_type() != q.scalar_type())
      return unsupported("infini: the CPU kernel was given ", x.scalar_type(),
                         "; it takes fp32 or bf16, one for q, k and v (fp64: form composite)");
    if (x.size(3) < 1 || x.size(3) > cpu::kMostDim)
      return unsupported("infini: a head dim of ", x.size(3), "; the CPU kernel takes 1 to ",
                         cpu::kMostDim);
  }
  return {};
}

at::Tensor read_by_cpu_kernel(const at::Tensor& q, const at::Tensor& local, const at::Tensor& M,
                              const at::Tensor& z, const at::Tensor& gate, bool bypass) {
  return ReadFunction::apply(q, local, M, z, gate, bypass);
}

std::pair<at::Tensor, at::Tensor> write_by_cpu_kernel(const at::Tensor& k, const at::Tensor& v,
                                                      const at::Tensor& weight) {
  const at::Tensor none = at::empty({0}, k.options().dtype(at::kFloat));
  const variable_list made = WriteFunction::apply(k, v, weight.defined() ? weight : none);
  return {made[0], made[1]};
}

}  // namespace everlong::infini
