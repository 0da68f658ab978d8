#include "mechanisms/lightning/op_cuda.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mechanisms/lightning/kernel_cuda.h"
#include "ops/cuda_device.h"
#include "ops/kernel_call.h"

namespace everlong::lightning {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The machine code of this build: sm_80, which serves all of its generation, and sm_90.
bool runs_here(at::Device device) {
  const int sm = compute_capability(device);
  return sm / 10 == 8 || sm == 90;
}

void* current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// 0: the sequences are not all of one length.
std::int64_t equal_length(at::IntArrayRef cu_seqlens) {
  if (cu_seqlens.empty()) return 0;
  for (std::size_t i = 2; i < cu_seqlens.size(); ++i)
    if (cu_seqlens[i] - cu_seqlens[i - 1] != cu_seqlens[1]) return 0;
  return cu_seqlens[1];
}

Tensor workspace_for(const Tensor& q, const Tensor& v) {
  return at::empty({cuda_workspace_bytes(q.size(0), q.size(2), q.size(3), v.size(3))},
                   q.options().dtype(at::kByte));
}
void* data_of(const Tensor& workspace) {
  return workspace.numel() == 0 ? nullptr : workspace.mutable_data_ptr();
}

// Everything of a call besides its tensors.
struct CudaJob {
  Decay decay;
  bool on_hopper = false;  // the chunk engine, else the sweep
  Fusion fusion = {};
  std::vector<std::int64_t> cu_seqlens = {};
  Tensor offsets = {};  // of them, on the device

  CudaPacking packing() const {
    if (cu_seqlens.empty()) return {};
    return {cu_seqlens, offsets.const_data_ptr<std::int32_t>()};
  }
  // Memory for states that belong to q and v; those of empty sequences are the old ones, or zero.
  Tensor new_states(const Tensor& old, const Tensor& q, const Tensor& v) const {
    const std::int64_t N =
        cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
    const Tensor states =
        at::empty({N, q.size(2), q.size(3), v.size(3)}, q.options().dtype(at::kFloat));
    for (std::size_t i = 1; i < cu_seqlens.size(); ++i)
      if (cu_seqlens[i] == cu_seqlens[i - 1])
        return old.defined() ? states.copy_(old) : states.zero_();
    return states;
  }
};

CudaJob make_job(const Decay& decay, bool on_hopper, const Fusion& fusion,
                 at::IntArrayRef cu_seqlens, at::Device device) {
  CudaJob job{decay, on_hopper, fusion, cu_seqlens.vec()};
  if (cu_seqlens.empty()) return job;
  std::vector<std::int32_t> offsets(2 * cu_seqlens.size());
  cuda_offsets(job.cu_seqlens, offsets);
  job.offsets = send_to_device(offsets, device);
  return job;
}

Attention run_step(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                   const Tensor& state) {
  const Attention out{at::empty(v.sizes(), v.options()), CudaJob{decay}.new_states(state, q, v)};
  CudaStep call;
  call.q_B1HK = input_view(q);
  call.k_B1HK = input_view(k);
  call.v_B1HV = input_view(v);
  call.o_B1HV = output_view(out.o_BTHV);
  call.state_in_NHKV = input_view(state);
  call.state_out_NHKV = output_view(out.state_NHKV);
  call.slope_H = decay.slope();
  call.scale = decay.scale();
  throw_if_error(cuda_step(call, current_stream(q.device())));
  return out;
}

Attention run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const CudaJob& job,
                      const Tensor& state) {
  const Attention out{at::empty(v.sizes(), v.options()),
                      job.fusion.final_state ? job.new_states(state, q, v) : Tensor(),
                      job.fusion.row_squares ? at::empty({v.size(0), v.size(2), v.size(1)},
                                                         v.options().dtype(at::kFloat))
                                                   .transpose(1, 2)
                                             : Tensor()};
  const Tensor workspace = workspace_for(q, v);
  CudaForward call;
  call.q_BTHK = input_view(q);
  call.k_BTHK = input_view(k);
  call.v_BTHV = input_view(v);
  call.o_BTHV = output_view(out.o_BTHV);
  call.state_in_NHKV = input_view(state);
  call.state_out_NHKV = output_view(out.state_NHKV);
  call.slope_H = job.decay.slope();
  call.scale = job.decay.scale();
  call.workspace = data_of(workspace);
  call.packing = job.packing();
  call.fused = {job.fusion.silu_q, job.fusion.silu_k, job.fusion.silu_v,
                job.fusion.row_squares ? out.row_squares_BTH.mutable_data_ptr<float>() : nullptr};
  throw_if_error(
      (job.on_hopper ? cuda_forward : cuda_sweep_forward)(call, current_stream(q.device())));
  return out;
}

Status check_rings(const Rings& rings) {
  const auto on_gpu = [&](const Tensor& x) {
    return x.defined() && x.is_cuda() && x.device() == rings.state_NHKV.device();
  };
  const auto is_list = [](const Tensor& x, at::ScalarType dtype, std::int64_t size) {
    return x.dim() == 1 && x.scalar_type() == dtype && x.is_contiguous() &&
           (size < 0 || x.size(0) == size);
  };
  for (const Tensor* x : {&rings.state_NHKV, &rings.keys_NHRK, &rings.values_NHRV})
    if (!on_gpu(*x) || x->dim() != 4)
      return invalid_argument(
          "lightning: a step with rings needs the state and both rings, four dimensions each, on "
          "one GPU; elsewhere take single tokens by decay_linear_attention");
  const std::int64_t N = rings.state_NHKV.size(0);
  if (!on_gpu(rings.waiting_N) || !is_list(rings.waiting_N, at::kInt, N))
    return invalid_argument("lightning: waiting must hold ", N,
                            " int32 numbers, one for each state, on the GPU");
  if (rings.slot_B.defined() && (!on_gpu(rings.slot_B) || !is_list(rings.slot_B, at::kLong, -1)))
    return invalid_argument("lightning: slots are int64 numbers [B] on the GPU");
  return {};
}

Tensor or_undefined(const Tensor& x) { return x.numel() == 0 ? Tensor() : x; }

// Keeps its inputs, with row squares its output too, and nothing else. silu is computed anew
// backward: what it makes of q, k and v is never kept. Autograd wants tensors that are there: empty
// ones stand for none.
struct KernelForm : torch::autograd::Function<KernelForm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& known, const CudaJob& job) {
    const Tensor state = or_undefined(known);
    ctx->saved_data["job"] = hold(job);
    // Nobody looks at the final state in training: its gradient stays absent instead of zeros that
    // would be written and read (128 sequences of 32 heads: 0.5 GB).
    ctx->set_materialize_grads(false);
    const Attention out = run_forward(q, k, v, job, state);
    ctx->save_for_backward({q, k, v, state, job.fusion.row_squares ? out.o_BTHV : Tensor()});
    return {out.o_BTHV, or_empty(out.state_NHKV, v), or_empty(out.row_squares_BTH, v)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto job = held<CudaJob>(ctx->saved_data["job"]);
    const c10::DeviceGuard guard(saved[0].device());
    const Fusion& fusion = job.fusion;
    const Tensor q = silu_where(fusion.silu_q, saved[0]), k = silu_where(fusion.silu_k, saved[1]),
                 v = silu_where(fusion.silu_v, saved[2]), &state = saved[3];
    const Tensor grad_states = fusion.final_state ? grads[1] : Tensor();
    Tensor incoming = grads[0].defined() ? grads[0] : at::zeros(v.sizes(), v.options());
    if (fusion.row_squares && grads[2].defined())
      incoming = (incoming + 2 * grads[2].unsqueeze(-1) * saved[4]).to(v.scalar_type());
    const Tensor grad_o = job.on_hopper ? with_aligned_rows(incoming) : with_plain_rows(incoming);
    const Tensor workspace = workspace_for(q, v);
    const Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty_like(grad_q),
                 grad_v = at::empty(v.sizes(), v.options()),
                 grad_state = state.defined() ? job.new_states(grad_states, q, v) : Tensor();
    CudaBackward call;
    call.q_BTHK = input_view(q);
    call.k_BTHK = input_view(k);
    call.v_BTHV = input_view(v);
    call.grad_o_BTHV = input_view(grad_o);
    call.state_in_NHKV = input_view(state);
    call.grad_state_NHKV = input_view(grad_states);
    call.grad_q_BTHK = output_view(grad_q);
    call.grad_k_BTHK = output_view(grad_k);
    call.grad_v_BTHV = output_view(grad_v);
    call.grad_state_in_NHKV = output_view(grad_state);
    call.slope_H = job.decay.slope();
    call.scale = job.decay.scale();
    call.workspace = data_of(workspace);
    call.packing = job.packing();
    throw_if_error(
        (job.on_hopper ? cuda_backward : cuda_sweep_backward)(call, current_stream(q.device())));
    return {grad_before_silu(fusion.silu_q, grad_q, saved[0]),
            grad_before_silu(fusion.silu_k, grad_k, saved[1]),
            grad_before_silu(fusion.silu_v, grad_v, saved[2]), grad_state, Tensor()};
  }
};

}  // namespace

std::string why_not_engine(at::Device device, at::ScalarType dtype, std::int64_t heads,
                           std::int64_t key_dim, std::int64_t value_dim) {
  const auto fits = [](std::int64_t dim) { return dim >= 8 && dim <= kCudaMaxDim && dim % 8 == 0; };
  if (!device.is_cuda()) return "not on a GPU";
  if (compute_capability(device) != 90)
    return "the GPU is not Hopper (sm_90), or this build has no CUDA";
  if (dtype != at::kBFloat16) return "it takes bf16 only";
  if (!fits(key_dim) || !fits(value_dim))
    return cat("head dims must be multiples of 8 up to ", kCudaMaxDim);
  if (heads > kCudaMaxHeads) return cat("more than ", kCudaMaxHeads, " heads");
  return {};
}

bool takes_fusion(const Tensor& q, const Tensor& v, at::IntArrayRef cu_seqlens) {
  const bool is_step = cu_seqlens.empty() && q.size(1) == 1;
  return !is_step && q.numel() > 0 && v.numel() > 0 &&
         std::max(q.size(3), v.size(3)) <= kCudaMaxFusedDim &&
         why_not_engine(q.device(), q.scalar_type(), q.size(2), q.size(3), v.size(3)).empty();
}

bool takes_cuda_sweep(at::Device device, at::ScalarType dtype, std::int64_t heads,
                      std::int64_t key_dim, std::int64_t value_dim) {
  return device.is_cuda() && runs_here(device) && dtype != at::kDouble && heads <= kCudaMaxHeads &&
         key_dim <= kCudaMaxDim && value_dim <= kCudaMaxDim;
}

std::optional<Attention> try_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                  const Decay& decay, at::IntArrayRef cu_seqlens,
                                  const std::optional<Tensor>& state_in, const Fusion& fusion) {
  if (!q_in.is_cuda() || q_in.numel() == 0 || v_in.numel() == 0 ||
      q_in.scalar_type() == at::kDouble)
    return std::nullopt;
  const std::int64_t heads = q_in.size(2), K = q_in.size(3), V = v_in.size(3);
  const Tensor state = state_in.has_value() ? state_in->to(at::kFloat) : Tensor();
  const bool differentiate = at::GradMode::is_enabled() &&
                             (q_in.requires_grad() || k_in.requires_grad() ||
                              v_in.requires_grad() || (state.defined() && state.requires_grad()));
  const c10::DeviceGuard guard(q_in.device());
  if (cu_seqlens.empty() && q_in.size(1) == 1 && !differentiate && runs_here(q_in.device()) &&
      heads <= kCudaMaxHeads && K <= kCudaMaxKeyDim)
    return run_step(with_plain_rows(q_in), with_plain_rows(k_in), with_plain_rows(v_in), decay,
                    with_plain_rows(state));
  const bool on_hopper = why_not_engine(q_in.device(), q_in.scalar_type(), heads, K, V).empty();
  if (!on_hopper && !takes_cuda_sweep(q_in.device(), q_in.scalar_type(), heads, K, V))
    return std::nullopt;

  // Packed sequences of one length are rows.
  const std::int64_t length = equal_length(cu_seqlens);
  const auto ready = [&](const Tensor& x) {
    const Tensor rows = length > 0 ? x.view({-1, length, x.size(2), x.size(3)}) : x;
    return on_hopper ? with_aligned_rows(rows) : with_plain_rows(rows);
  };
  const Tensor q = ready(q_in), k = ready(k_in), v = ready(v_in);
  const CudaJob job =
      make_job(decay, on_hopper, fusion, length > 0 ? at::IntArrayRef() : cu_seqlens, q.device());
  Attention out;
  if (differentiate) {
    const auto results = KernelForm::apply(q, k, v, or_empty(state, q), job);
    out = {results[0], or_undefined(results[1]), or_undefined(results[2])};
  } else {
    out = run_forward(q, k, v, job, state);
  }
  out.o_BTHV = out.o_BTHV.view(v_in.sizes());
  if (fusion.row_squares)
    out.row_squares_BTH = out.row_squares_BTH.reshape({v_in.size(0), v_in.size(1), heads});
  return out;
}

Tensor step_with_rings(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                       const Rings& rings) {
  throw_if_error(check_rings(rings));
  const c10::DeviceGuard guard(rings.state_NHKV.device());
  const bool arrives = q.defined();
  const Tensor o = arrives ? at::empty(v.sizes(), v.options()) : Tensor();
  const Tensor rows[] = {with_plain_rows(q), with_plain_rows(k), with_plain_rows(v)};
  CudaRingStep call;
  call.q_B1HK = input_view(rows[0]);
  call.k_B1HK = input_view(rows[1]);
  call.v_B1HV = input_view(rows[2]);
  call.o_B1HV = output_view(o);
  call.state_NHKV = output_view(rings.state_NHKV);
  call.keys_NHRK = output_view(rings.keys_NHRK);
  call.values_NHRV = output_view(rings.values_NHRV);
  call.waiting_N = rings.waiting_N.const_data_ptr<std::int32_t>();
  call.slot_B = rings.slot_B.defined() ? rings.slot_B.const_data_ptr<std::int64_t>() : nullptr;
  call.batch = rings.slot_B.defined() ? rings.slot_B.size(0) : rings.state_NHKV.size(0);
  call.slope_H = decay.slope();
  call.scale = decay.scale();
  throw_if_error(cuda_ring_step(call, current_stream(rings.state_NHKV.device())));
  return o;
}

}  // namespace everlong::lightning
