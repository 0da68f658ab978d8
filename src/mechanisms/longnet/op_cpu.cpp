#include "mechanisms/longnet/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "mechanisms/longnet/kernel.h"
#include "mechanisms/longnet/op_lattice.h"
#include "ops/kernel_call.h"
#include "ops/operator.h"
#include "ops/parallel.h"

namespace everlong::longnet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What one call is beside tensors.
struct Job {
  Geometry geometry;
  double scale = 1;
  std::int64_t position = 0;
};

// A KernelCall and what it points to. The tensors must outlive it.
struct Arguments {
  std::vector<KernelPiece> pieces;
  std::vector<ConstTensorView> past_k, past_v;
  KernelCall call;

  Arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
            const std::vector<at::Tensor>& old_k, const std::vector<at::Tensor>& old_v,
            const Job& job) {
    for (const Piece& p : make_pieces(job.geometry, q.size(2), k.size(2), job.position, q.size(1)))
      pieces.push_back({p.pattern, p.segment, p.ratio, p.heads, p.run});
    for (const at::Tensor& x : old_k) past_k.push_back(input_view(x));
    for (const at::Tensor& x : old_v) past_v.push_back(input_view(x));
    call = {input_view(q), input_view(k), input_view(v),       pieces,
            past_k,        past_v,        job.geometry.causal, job.scale};
  }
};

std::vector<at::Tensor> plain(at::TensorList list) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& x : list) out.push_back(with_plain_rows(x));
  return out;
}

struct ForwardResult {
  at::Tensor out, lse;  // fp32 [B, T, H, V] and [B, T, H, 1]
};
ForwardResult run_forward(const KernelCall& call) {
  const std::int64_t B = call.q.sizes[0], T = call.q.sizes[1], H = call.q.sizes[2];
  const ForwardResult made{
      at::zeros({B, T, H, call.v.sizes[3]}, at::kFloat),
      at::full({B, T, H, 1}, -std::numeric_limits<double>::infinity(), at::kFloat)};
  const Executor& threads = torch_executor();
  const Workspace workspace(forward_workspace_bytes(call, threads.threads()));
  throw_if_error(longnet::forward(call, output_view(made.out), output_view(made.lse),
                                  workspace.bytes(), threads));
  return made;
}

struct KernelFunction : torch::autograd::Function<KernelFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_BTHK,
                            const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                            at::TensorList past_k, at::TensorList past_v, const Job& job) {
    const at::Tensor q = with_plain_rows(q_BTHK), k = with_plain_rows(k_BTGK),
                     v = with_plain_rows(v_BTGV);
    const std::vector<at::Tensor> old_k = plain(past_k), old_v = plain(past_v);
    const Arguments arguments(q, k, v, old_k, old_v, job);
    const ForwardResult made = run_forward(arguments.call);
    const at::Tensor result = made.out.to(q.scalar_type());
    variable_list saved = {q, k, v, result, made.lse};
    saved.insert(saved.end(), old_k.begin(), old_k.end());
    saved.insert(saved.end(), old_v.begin(), old_v.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["job"] = hold(job);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const Job job = held<Job>(ctx->saved_data["job"]);
    const auto middle = saved.begin() + 5 + static_cast<std::ptrdiff_t>(saved.size() - 5) / 2;
    const std::vector<at::Tensor> old_k(saved.begin() + 5, middle), old_v(middle, saved.end());
    const at::Tensor grad_o = with_plain_rows(grads[0]);
    variable_list d;
    for (std::size_t i = 0; i < saved.size(); ++i)
      if (i < 3 || i >= 5)
        d.push_back(at::zeros(saved[i].sizes(), saved[i].options().dtype(at::kFloat)));
    const Arguments arguments(q, k, v, old_k, old_v, job);
    std::vector<TensorView> to_k, to_v;
    for (std::size_t i = 0; i < old_k.size(); ++i) {
      to_k.push_back(output_view(d[3 + i]));
      to_v.push_back(output_view(d[3 + old_k.size() + i]));
    }
    // Adds the gradients through these pieces; o is what the mean gradient of a row is taken with.
    const auto add = [&](const KernelCall& call, const at::Tensor& o) {
      const KernelGrads by_name{input_view(o),
                                input_view(saved[4]),
                                input_view(grad_o),
                                output_view(d[0]),
                                output_view(d[1]),
                                output_view(d[2]),
                                to_k,
                                to_v};
      const Executor& threads = torch_executor();
      const Workspace workspace(backward_workspace_bytes(call, threads.threads()));
      throw_if_error(longnet::backward(call, by_name, workspace.bytes(), threads));
    };
    if (!job.geometry.detached) {
      add(arguments.call, saved[3]);
    } else {  // each pattern with its own output, made again
      for (std::size_t i = 0; i < job.geometry.patterns.size(); ++i) {
        std::vector<KernelPiece> own;
        for (const KernelPiece& piece : arguments.pieces)
          if (piece.pattern == i) own.push_back(piece);
        KernelCall call = arguments.call;
        call.pieces = own;
        add(call, run_forward(call).out);
      }
    }
    for (at::Tensor& x : d) x = x.to(q.scalar_type());
    d.emplace_back();  // of the job
    return d;
  }
};

}  // namespace

Status check_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const Options& options) {
  if (!q.is_cpu() || !k.is_cpu() || !v.is_cpu() || q.dim() != 4 || k.dim() != 4 || v.dim() != 4)
    return unsupported("longnet: the CPU kernel was given tensors on ", q.device().str(), ", ",
                       k.device().str(), ", ", v.device().str(), "; it takes [B, T, H, D] on cpu");
  if ((q.scalar_type() != at::kFloat && q.scalar_type() != at::kBFloat16) ||
      k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type())
    return unsupported("longnet: the CPU kernel was given ", q.scalar_type(), ", ", k.scalar_type(),
                       ", ", v.scalar_type(),
                       "; it takes fp32 or bf16, one for q, k and v (fp64: form composite)");
  if (options.xpos_base > 0)
    return unsupported("longnet: the CPU kernel has no XPos; it takes form composite");
  KernelCall call;
  for (auto [view, tensor] : {std::pair(&call.q, &q), {&call.k, &k}, {&call.v, &v}}) {
    view->dtype = dtype_of(*tensor);
    view->sizes = {1, 1, 1, tensor->size(3)};
    view->strides = {0, 0, 0, 1};
  }
  return check_kernel_call(call);
}

at::Tensor attention_by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const Options& options, double scale, const Past& past) {
  return KernelFunction::apply(q, k, v, at::TensorList(past.k), at::TensorList(past.v),
                               Job{options.geometry, scale, past.position});
}

}  // namespace everlong::longnet
