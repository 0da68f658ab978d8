#include "mechanisms/lightning/op.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "mechanisms/lightning/op_cpu.h"
#include "mechanisms/lightning/op_cuda.h"
#include "mechanisms/lightning/op_part.h"

namespace everlong::lightning {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Tuned on two cores with 1 MB of second-level cache each, fp32, K = V = 48 to 128, forward and
// backward: chunks of 64 cost 5 to 10 % more (the scores grow with the chunk, which outweighs the
// faster products), 128 costs 40 %. A block of 2^17 elements of k and v keeps its dozen temporaries
// near the cache; everything at once is 20 to 60 % slower.
constexpr PlanLimits kCpuLimits{.chunk = 32, .group = 8, .tokens = 0};
constexpr std::int64_t kCpuElements = std::int64_t{1} << 17;
// A GPU wants few large launches; the bound is on memory, about 1 GB of temporaries.
constexpr PlanLimits kGpuLimits{.chunk = 64, .group = 64, .tokens = 0};
constexpr std::int64_t kGpuElements = std::int64_t{1} << 25;
// A call of fewer elements is not worth a second thread.
constexpr std::int64_t kSmallCall = std::int64_t{1} << 14;

PlanLimits limits_of(const Tensor& q, const Tensor& v) {
  PlanLimits limits = q.device().is_cpu() ? kCpuLimits : kGpuLimits;
  limits.tokens =
      (q.device().is_cpu() ? kCpuElements : kGpuElements) / (q.size(2) * (q.size(3) + v.size(3)));
  return limits;
}

// Threads share out the batches of rows; where those are fewer, each batch's heads too. Blocks in
// threads beat threads in blocks: no thread waits for another between two small operations.
std::int64_t heads_at_once(const Tensor& q, const Tensor& v, const Plan& plan) {
  const std::int64_t heads = q.size(2),
                     batches = static_cast<std::int64_t>(plan.batches.size()) - 1;
  const std::int64_t elements = q.size(0) * q.size(1) * heads * (q.size(3) + v.size(3));
  if (!q.device().is_cpu() || elements < kSmallCall || batches == 0) return heads;
  const std::int64_t groups =
      std::clamp<std::int64_t>((at::get_num_threads() + batches - 1) / batches, 1, heads);
  return (heads + groups - 1) / groups;
}

// Calls visit(part, index of its checkpoint) for every part: those of one batch and head group in
// the order of time or against it, the others at the same time on the CPU's threads.
template <class Visit>
void for_each_part(const Job& job, bool back, const Visit& visit) {
  const auto batches = static_cast<std::int64_t>(job.plan.batches.size()) - 1;
  const auto blocks = static_cast<std::int64_t>(job.plan.blocks.size());
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;  // a worker thread has a grad mode of its own
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t group = unit / batches,
                         from = job.plan.batches[static_cast<std::size_t>(unit % batches)],
                         to = job.plan.batches[static_cast<std::size_t>(unit % batches) + 1];
      for (std::int64_t i = 0; i < to - from; ++i) {
        const std::int64_t block = back ? to - 1 - i : from + i;
        visit(Part(job, job.plan.blocks[static_cast<std::size_t>(block)], group * job.head_group),
              static_cast<std::size_t>(group * blocks + block));
      }
    }
  };
  const std::int64_t units = batches * job.head_groups();
  if (job.options.device().is_cpu())
    at::parallel_for(0, units, 1, run);
  else
    run(0, units);
}

// states [N, ...] <-> rows of the plan.
Tensor to_rows(const Job& job, const Tensor& states) {
  return job.plan.packed() ? states.index_select(0, job.order)
                           : states.clone(at::MemoryFormat::Contiguous);
}
Tensor from_rows(const Job& job, const Tensor& rows, const Tensor& states) {
  return job.plan.packed() ? states.index_copy(0, job.order, rows) : rows;
}
Tensor make_output(const Job& job, const Tensor& like) {
  return at::empty(
      {like.size(0), like.size(1) + (job.plan.packed() ? 1 : 0), like.size(2), like.size(3)},
      like.options());
}
Tensor without_padding(const Tensor& out, const Tensor& like) {
  return out.narrow(1, 0, like.size(1));
}

// checkpoints: S before each part, for the backward pass; null: not wanted.
Attention forward(const Job& job, const Inputs& in, const Tensor& state,
                  std::vector<Tensor>* checkpoints) {
  const Tensor states = to_rows(job, state), out = make_output(job, in.v);
  if (checkpoints != nullptr)
    checkpoints->resize(job.plan.blocks.size() * static_cast<std::size_t>(job.head_groups()));
  for_each_part(job, /*back=*/false, [&](const Part& part, std::size_t index) {
    if (checkpoints != nullptr) (*checkpoints)[index] = part.states(states).clone();
    forward_part(part, in, states, out);
  });
  return {without_padding(out, in.v), from_rows(job, states, state)};
}

// The backward pass by hand: it keeps q, k, v and one state a block, where autograd would keep
// every product and copy (three times as much again at K = V = 64), and both passes together take
// 10 to 30 % less time.
struct ChunkForm : torch::autograd::Function<ChunkForm> {
  struct Holder : torch::CustomClassHolder {
    explicit Holder(Job job_in) : job(std::move(job_in)) {}
    Job job;
  };

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& state,
                               const c10::intrusive_ptr<Holder>& holder) {
    std::vector<Tensor> checkpoints;
    const Attention result = lightning::forward(holder->job, {q, k, v}, state, &checkpoints);
    variable_list saved = {q, k, v};
    saved.insert(saved.end(), checkpoints.begin(), checkpoints.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = c10::IValue::make_capsule(holder);
    return {result.o_BTHV, result.state_NHKV};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto capsule = ctx->saved_data["job"].toCapsule();
    const Job& job = static_cast<const Holder&>(*capsule).job;
    const Inputs in{saved[0], saved[1], saved[2]};
    const Tensor grad_o = grads[0].stride(3) == 1 ? grads[0] : grads[0].contiguous();
    const Gradients out{make_output(job, in.q), make_output(job, in.k), make_output(job, in.v)};
    const Tensor reverse = to_rows(job, grads[1]);
    for_each_part(job, /*back=*/true, [&](const Part& part, std::size_t index) {
      backward_part(part, in, grad_o, saved[3 + index], reverse, out);
    });
    return {without_padding(out.q, in.q), without_padding(out.k, in.k),
            without_padding(out.v, in.v), from_rows(job, reverse, grads[1]), Tensor()};
  }
};

// One token for every sequence: the recurrence itself, by autograd.
Attention step(const Tensor& q, const Tensor& k, const Tensor& v, const Job& job,
               const Tensor& state) {
  const auto token = [&](const Tensor& x) { return x.select(1, 0).to(state.scalar_type()); };
  const Tensor lost = job.tables().lost_in_tokens_Hm.select(1, 1).view({-1, 1, 1});
  const Tensor change = at::addcmul(token(k).unsqueeze(-1) * token(v).unsqueeze(-2), state, lost);
  const Tensor next = state + change;
  const Tensor o = at::matmul(token(q).unsqueeze(-2), next) * job.decay.scale();  // [B, H, 1, V]
  return {o.transpose(1, 2).to(v.scalar_type()), next};
}

// Packed sequences of one length are rows.
std::optional<std::int64_t> common_length(at::IntArrayRef cu_seqlens) {
  for (std::size_t i = 2; i < cu_seqlens.size(); ++i)
    if (cu_seqlens[i] - cu_seqlens[i - 1] != cu_seqlens[1] - cu_seqlens[0]) return std::nullopt;
  return cu_seqlens[1] - cu_seqlens[0];
}

Attention rows_or_packed(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                         at::IntArrayRef cu_seqlens, const Tensor& state) {
  Job job{
      .decay = decay, .options = state.options(), .limits = limits_of(q, v), .heads = q.size(2)};
  if (cu_seqlens.empty() && q.size(1) == 1) return step(q, k, v, job, state);
  job.plan = cu_seqlens.empty() ? plan_rows(q.size(0), q.size(1), job.limits)
                                : plan_packed(cu_seqlens, job.limits);
  job.head_group = heads_at_once(q, v, job.plan);
  if (job.plan.packed()) {
    job.slots = at::tensor(job.plan.slot_token, at::kLong).to(q.device());
    job.order = at::tensor(job.plan.order, at::kLong).to(q.device());
    job.head_index = at::arange(job.head_group, job.slots.options()).view({1, -1, 1, 1});
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || state.requires_grad());
  if (!differentiate) return forward(job, {q, k, v}, state, nullptr);
  const auto results =
      ChunkForm::apply(q, k, v, state, c10::make_intrusive<ChunkForm::Holder>(std::move(job)));
  return {results[0], results[1]};
}

bool takes_cpu_kernel(const Tensor& q, const Tensor& k, const Tensor& v, Path path) {
  if (path == Path::kComposite || (path == Path::kAuto && !q.device().is_cpu())) return false;
  const Status status = check_cpu_kernel(q, k, v);
  if (path == Path::kCpu) throw_if_error(status);
  return status.ok();
}

Attention run(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
              at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state_in, Path path,
              const Fusion& fusion) {
  const bool on_gpu = path == Path::kAuto && q.is_cuda() && q.size(1) > 0;
  if (on_gpu && (!fusion.any() || takes_fusion(q, v, cu_seqlens)))
    if (const auto result = try_cuda(q, k, v, decay, cu_seqlens, state_in, fusion)) return *result;
  if (fusion.any()) {
    Attention result = run(silu_where(fusion.silu_q, q), silu_where(fusion.silu_k, k),
                           silu_where(fusion.silu_v, v), decay, cu_seqlens, state_in, path,
                           {.final_state = fusion.final_state});
    if (fusion.row_squares) result.row_squares_BTH = row_squares(result.o_BTHV);
    return result;
  }
  if (takes_cpu_kernel(q, k, v, path) && q.size(1) > 0)
    return attention_by_cpu_kernel(q, k, v, decay, cu_seqlens, state_in);
  const std::int64_t N =
      cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  const auto options = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor state = state_in.has_value()
                           ? state_in->to(options.dtype())
                           : at::zeros({N, q.size(2), q.size(3), v.size(3)}, options);
  if (q.size(1) == 0) return {at::empty_like(v), state.clone()};
  const auto length = cu_seqlens.empty() ? std::optional(q.size(1)) : common_length(cu_seqlens);
  // Products want the last dimension contiguous; every other stride is free.
  const auto ready = [&](const Tensor& x) {
    const Tensor dense = x.stride(3) == 1 ? x : x.contiguous();
    return length.has_value() ? dense.view({N, *length, x.size(2), x.size(3)}) : dense;
  };
  Attention result = rows_or_packed(ready(q), ready(k), ready(v), decay,
                                    length.has_value() ? at::IntArrayRef() : cu_seqlens, state);
  result.o_BTHV = result.o_BTHV.reshape(v.sizes());
  return result;
}

}  // namespace

std::string_view path_taken(const Tensor& q, const Tensor& k, const Tensor& v, Path path) {
  if (path == Path::kAuto && q.is_cuda()) {
    if (why_not_engine(q.device(), q.scalar_type(), q.size(2), q.size(3), v.size(3)).empty())
      return "cuda";
    if (takes_cuda_sweep(q.device(), q.scalar_type(), q.size(2), q.size(3), v.size(3)))
      return "cuda sweep";
  }
  return takes_cpu_kernel(q, k, v, path) ? "cpu" : "composite";
}

at::Tensor silu_where(bool wanted, const at::Tensor& x) { return wanted ? at::silu(x) : x; }
at::Tensor grad_before_silu(bool wanted, const at::Tensor& grad, const at::Tensor& x) {
  return wanted ? at::silu_backward(grad, x) : grad;
}
at::Tensor or_empty(const at::Tensor& x, const at::Tensor& like) {
  return x.defined() ? x : at::empty({0}, like.options().dtype(at::kFloat));
}

at::Tensor row_squares(const at::Tensor& o) {
  const auto dtype = o.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return o.to(dtype).square().sum(-1);
}

Attention decay_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Decay& decay, at::IntArrayRef cu_seqlens,
                                 const std::optional<Tensor>& state, Path path,
                                 const Fusion& fusion) {
  throw_if_error(check_arguments(q, k, v, decay, cu_seqlens, state));
  Attention result = run(q, k, v, decay, cu_seqlens, state, path, fusion);
  if (!fusion.final_state) result.state_NHKV.reset();
  return result;
}

}  // namespace everlong::lightning
