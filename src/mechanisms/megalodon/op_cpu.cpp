#include "mechanisms/megalodon/op_cpu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mechanisms/megalodon/kernel.h"
#include "mechanisms/megalodon/op_rows.h"
#include "ops/kernel_call.h"
#include "ops/parallel.h"

namespace everlong::megalodon {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a call has besides tensors.
struct Numbers {
  std::vector<std::int64_t> offsets, counts;
  std::int64_t groups = 0, modes = 0;
  double eps = 0;
};

// The tensors of a call by place. Those of an absent part have no elements: autograd takes no
// undefined ones in a list.
enum Place { kX, kGain, kBias, kMean, kVar, kPlanes, kOmega, kH, kPlaces };

template <class T>
const T* data_of(const at::Tensor& x) {
  return x.defined() && x.numel() > 0 ? x.const_data_ptr<T>() : nullptr;
}
template <class T>
T* place_of(const at::Tensor& x) {
  return x.defined() && x.numel() > 0 ? x.mutable_data_ptr<T>() : nullptr;
}

NormEmaCall call_of(const variable_list& in, const Numbers& numbers) {
  NormEmaCall call;
  call.x = input_view(in[kX]);
  call.offsets = numbers.offsets;
  call.groups = numbers.groups;
  call.eps = numbers.eps;
  call.gain = data_of<float>(in[kGain]);
  call.bias = data_of<float>(in[kBias]);
  call.counts = numbers.counts;
  call.mean = data_of<double>(in[kMean]);
  call.var = data_of<double>(in[kVar]);
  call.modes = numbers.modes;
  call.coefficients = data_of<float>(in[kPlanes]);
  call.omega = data_of<float>(in[kOmega]);
  call.h = data_of<float>(in[kH]);
  return call;
}

struct KernelFunction : torch::autograd::Function<KernelFunction> {
  // -> u, mean, var (with a norm), e, h (with an average).
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Numbers& numbers,
                               bool differentiable) {
    const variable_list in = inputs.vec();
    const at::Tensor& x = in[kX];
    const NormEmaCall call = call_of(in, numbers);
    const std::int64_t N = call.sequences(), D = call.width(), G = call.groups, M = call.modes;
    const auto wide = x.options().dtype(at::kDouble), single = x.options().dtype(at::kFloat);
    at::Tensor u, mean, var, e, h, means, scales, checkpoints;
    if (G > 0) {
      u = at::empty(x.sizes(), x.options());
      mean = at::empty({N, G}, wide);
      var = at::empty({N, G}, wide);
      if (differentiable) {
        means = at::empty({call.batch() * call.tokens(), G}, wide);
        scales = at::empty_like(means);
      }
    }
    if (M > 0) {
      e = at::empty(x.sizes(), x.options());
      h = at::empty({N, D, M, 2}, single);
      if (differentiable) checkpoints = at::empty({call.segments(), M, 2, D}, single);
    }
    const NormEmaResult result{output_view(u),           output_view(e),
                               place_of<double>(mean),   place_of<double>(var),
                               place_of<float>(h),       place_of<double>(means),
                               place_of<double>(scales), place_of<float>(checkpoints)};
    const Executor& threads = torch_executor();
    const Workspace workspace(forward_workspace_bytes(call, threads.threads()));
    throw_if_error(megalodon::forward(call, result, workspace.bytes(), threads));
    if (differentiable) {
      variable_list saved = in;
      saved.insert(saved.end(), {means, scales, checkpoints});
      ctx->save_for_backward(saved);
      ctx->saved_data["numbers"] = hold(numbers);
    }
    variable_list out;
    if (G > 0) out.insert(out.end(), {u, mean, var});
    if (M > 0) out.insert(out.end(), {e, h});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const variable_list saved = ctx->get_saved_variables();
    const auto numbers = held<Numbers>(ctx->saved_data["numbers"]);
    const NormEmaCall call = call_of(saved, numbers);
    const std::int64_t G = call.groups, M = call.modes;
    const std::size_t of_average = G > 0 ? 3 : 0;
    const auto plain = [](const at::Tensor& x) {
      return x.defined() ? x.contiguous() : at::Tensor();
    };
    at::Tensor grad_u, grad_mean, grad_var, grad_e, grad_h;
    if (G > 0) {
      grad_u = with_plain_rows(given[0]);
      grad_mean = plain(given[1]);
      grad_var = plain(given[2]);
    }
    if (M > 0) {
      grad_e = with_plain_rows(given[of_average]);
      grad_h = plain(given[of_average + 1]);
    }
    variable_list out(kPlaces + 2);  // after the tensors: numbers and the flag
    for (std::size_t i = 0; i < kPlaces; ++i)
      out[i] = at::empty(saved[i].sizes(), saved[i].options());
    at::Tensor grad_start = out[kH];  // without an initial state the kernel still writes one
    if (M > 0 && grad_start.numel() == 0)
      grad_start =
          at::empty({call.sequences(), call.width(), M, 2}, saved[kX].options().dtype(at::kFloat));
    NormEmaGrads grads;
    grads.grad_u = input_view(grad_u);
    grads.grad_e = input_view(grad_e);
    grads.grad_mean = data_of<double>(grad_mean);
    grads.grad_var = data_of<double>(grad_var);
    grads.grad_h = data_of<float>(grad_h);
    grads.means = data_of<double>(saved[kPlaces]);
    grads.scales = data_of<double>(saved[kPlaces + 1]);
    grads.checkpoints = data_of<float>(saved[kPlaces + 2]);
    grads.grad_x = output_view(out[kX]);
    grads.grad_gain = place_of<float>(out[kGain]);
    grads.grad_bias = place_of<float>(out[kBias]);
    grads.grad_coefficients = place_of<float>(out[kPlanes]);
    grads.grad_omega = place_of<float>(out[kOmega]);
    grads.grad_mean_in = place_of<double>(out[kMean]);
    grads.grad_var_in = place_of<double>(out[kVar]);
    grads.grad_h_in = place_of<float>(grad_start);
    const Executor& threads = torch_executor();
    const Workspace workspace(backward_workspace_bytes(call, threads.threads()));
    throw_if_error(megalodon::backward(call, grads, workspace.bytes(), threads));
    return out;
  }
};

at::Tensor dense(const at::Tensor& x, at::ScalarType dtype) { return x.to(dtype).contiguous(); }

}  // namespace

Status check_cpu_kernel(const at::Tensor& x) {
  if (!x.is_cpu())
    return unsupported("megalodon: the CPU kernel was given tensors on ", x.device().str(),
                       "; it takes tensors on cpu");
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16)
    return unsupported("megalodon: the CPU kernel was given ", x.scalar_type(),
                       "; it takes fp32 or bf16 (fp64: form composite)");
  return {};
}

NormAveraged norm_cema_by_cpu_kernel(const at::Tensor& x, const NormWeights* norm,
                                     const EmaWeights* average, Offsets offsets,
                                     const NormState& state, const at::Tensor& h) {
  Numbers numbers;
  numbers.offsets.assign(offsets.begin(), offsets.end());
  variable_list in(kPlaces, at::empty({0}, x.options().dtype(at::kFloat)));
  in[kX] = with_plain_rows(x);
  if (norm != nullptr) {
    numbers.groups = state.mean_NG.size(1);
    numbers.counts = state.counts;
    numbers.eps = norm->eps;
    in[kGain] = dense(norm->weight_D, at::kFloat) + 1;
    in[kBias] = dense(norm->bias_D, at::kFloat);
    in[kMean] = dense(state.mean_NG, at::kDouble);
    in[kVar] = dense(state.var_NG, at::kDouble);
  }
  if (average != nullptr) {
    numbers.modes = average->modes();
    in[kPlanes] = average->planes_5MD.defined() ? average->planes_5MD : ema_planes(*average);
    in[kOmega] = dense(average->omega_D1, at::kFloat).view({-1});
    if (h.defined()) in[kH] = dense(h, at::kFloat);
  }
  bool differentiable = false;
  for (const at::Tensor& tensor : in)
    differentiable |= tensor.requires_grad() && at::GradMode::is_enabled();
  const variable_list out = KernelFunction::apply(at::TensorList(in), numbers, differentiable);
  NormAveraged result;
  std::size_t next = 0;
  if (norm != nullptr) {
    result.u_BTD = out[0];
    result.norm = {state.counts, out[1], out[2]};
    for (std::size_t n = 0; n < state.counts.size(); ++n)
      result.norm.counts[n] += offsets.empty() ? x.size(1) : offsets[n + 1] - offsets[n];
    next = 3;
  }
  if (average != nullptr) {
    result.e_BTD = out[next];
    result.h_NDM2 = out[next + 1];
  }
  return result;
}

}  // namespace everlong::megalodon
