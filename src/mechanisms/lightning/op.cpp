#include "mechanisms/lightning/op.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdlib>

#include "mechanisms/lightning/op_plan.h"

namespace everlong::lightning {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::int64_t env(const char* name, std::int64_t fallback) {
  const char* v = std::getenv(name);
  return v ? std::atoll(v) : fallback;
}

// What one call needs to know besides its tensors; kept for the backward pass.
struct Job : torch::CustomClassHolder {
  Job(const Decay& decay_in, const at::TensorOptions& options_in)
      : decay(decay_in), options(options_in) {}
  Decay decay;
  at::TensorOptions options;  // of everything inside: the state's dtype
  PlanLimits limits;
  Plan plan;
  std::int64_t heads = 0, head_group = 0;  // heads that are computed together
  Tensor slots, order, head_index;         // packed: on the device; head_index [1, G, 1, 1]

  const DecayTables& tables() const { return decay.tables(options, limits.chunk, limits.group); }
};

// On the CPU one head at a time: q, k, v are then read where they lie, and threads share nothing.
// Blocks whose tensors fit the second-level cache.
constexpr std::int64_t kCpuElements = std::int64_t{1} << 17;
constexpr std::int64_t kSmallCall = std::int64_t{1}
                                    << 15;  // elements below which a loop over heads costs more

void set_limits(Job& job, const Tensor& q, const Tensor& v) {
  const std::int64_t dims = q.size(3) + v.size(3);
  job.heads = job.head_group = q.size(2);
  if (q.device().is_cpu()) {
    if (q.size(0) * q.size(1) * q.size(2) * dims > env("LS", kSmallCall)) job.head_group = 1;
    job.limits = {.chunk = env("LN", dims <= 192 ? 32 : 64),
                  .group = env("LG", 8),
                  .tokens = env("LE", kCpuElements) / (job.head_group * dims)};
  } else {
    job.limits = {.chunk = 64, .group = 64, .tokens = (std::int64_t{1} << 25) / (job.heads * dims)};
  }
}

at::ScalarType state_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The decays of one part, cut out of the tables. A leading A is the part's rows, or 1 where all
// share the numbers.
struct BlockDecay {
  Tensor mask_G1nn, to_end_G1n1;
  Tensor from_start;  // [G, 1, n, 1]; packed first chunks [A, G, 1, n, 1]: counted from the row's
                      // own first token
  Tensor lost;        // [A, G, 1, 1], expm1(-s tokens)
  Tensor between_BRR, chunks_GR1, chunk_G11;  // several chunks only: see DecayTables; B = A G
};

// One block for a group of heads. Inside, tokens are laid out as [A, G, R, n, D], kept as [A G R,
// n, D].
class Part {
 public:
  Part(const Job& job, const Block& block, std::int64_t first_head)
      : job_(job),
        b_(block),
        first_head_(first_head),
        heads_(std::min(job.head_group, job.heads - first_head)) {}

  std::int64_t rows() const { return b_.rows; }
  std::int64_t heads() const { return heads_; }
  std::int64_t ranks() const { return b_.ranks; }
  std::int64_t chunk() const { return b_.chunk; }

  // The part's tokens of x [B, T, H, D] in the working dtype; a view where the strides allow;
  // padding is zero.
  Tensor load(const Tensor& x) const {
    const Tensor mine = x.narrow(2, first_head_, heads_);
    const std::int64_t dim = x.size(3);
    if (!job_.plan.packed()) {
      return mine.narrow(0, b_.row, rows())
          .narrow(1, b_.first, ranks() * chunk())
          .view({rows(), ranks(), chunk(), heads_, dim})
          .permute({0, 3, 1, 2, 4})
          .reshape({-1, chunk(), dim})
          .to(job_.options.dtype());
    }
    Tensor slots = this->slots(), padding;
    if (!b_.length.empty()) {
      padding = slots.eq(x.size(1));
      slots = slots.clamp_max(x.size(1) - 1);
    }
    Tensor out = at::index(mine.select(0, 0), {slots, head_index()}).to(job_.options.dtype());
    if (padding.defined()) out.masked_fill_(padding.unsqueeze(-1), 0);
    return out.view({-1, chunk(), dim});
  }

  // The reverse; `out` is [B, T, H, D], packed: [1, T+1, H, D] whose last token takes the padding.
  void store(const Tensor& value, const Tensor& out) const {
    const Tensor mine = out.narrow(2, first_head_, heads_);
    const std::int64_t dim = out.size(3);
    const Tensor v = value.view({rows(), heads_, ranks(), chunk(), dim});
    if (!job_.plan.packed()) {
      mine.narrow(0, b_.row, rows())
          .narrow(1, b_.first, ranks() * chunk())
          .view({rows(), ranks(), chunk(), heads_, dim})
          .copy_(v.permute({0, 2, 3, 1, 4}));
    } else {
      mine.select(0, 0).index_put_({slots(), head_index()}, v.to(out.scalar_type()));
    }
  }

  // The part's rows and heads of states [rows, H, K, V].
  Tensor states(const Tensor& all) const {
    return all.narrow(0, b_.row, rows()).narrow(1, first_head_, heads_);
  }

  BlockDecay decay(const DecayTables& t) const {
    const auto mine = [&](const Tensor& table) { return table.narrow(0, first_head_, heads_); };
    BlockDecay d;
    d.mask_G1nn = mine(t.mask_H1nn).narrow(2, 0, chunk()).narrow(3, 0, chunk());
    d.from_start = mine(t.from_start_H1n1).narrow(2, 0, chunk());
    d.to_end_G1n1 = mine(t.to_end_H1n1).narrow(2, t.chunk - chunk(), chunk());
    if (!b_.length.empty()) {
      const Tensor length = at::tensor(b_.length, at::kLong).to(job_.options.device());
      const Tensor local =
          (at::arange(chunk(), length.options()) - (chunk() - length.unsqueeze(1))).clamp_min(0);
      d.from_start = mine(t.from_start_H1n1)
                         .reshape({heads_, -1})
                         .index_select(1, local.view(-1))
                         .view({heads_, rows(), 1, chunk(), 1})
                         .transpose(0, 1);
      d.lost = mine(t.lost_in_tokens_Hm).index_select(1, length).t().unsqueeze(-1).unsqueeze(-1);
    } else if (ranks() == 1) {
      d.lost = mine(t.lost_in_tokens_Hm).select(1, chunk()).reshape({1, heads_, 1, 1});
    } else {
      d.lost = mine(t.lost_in_chunks_Hr).select(1, ranks()).reshape({1, heads_, 1, 1});
      d.between_BRR = mine(t.between_HRR)
                          .narrow(1, 0, ranks())
                          .narrow(2, 0, ranks())
                          .expand({rows(), heads_, ranks(), ranks()})
                          .reshape({-1, ranks(), ranks()});
      d.chunks_GR1 = mine(t.chunks_HR1).narrow(1, 0, ranks());
      d.chunk_G11 = mine(t.chunks_HR1).narrow(1, 1, 1);
    }
    return d;
  }

 private:
  Tensor slots() const {
    return job_.slots.narrow(0, b_.first, rows() * ranks() * chunk())
        .view({rows(), 1, ranks(), chunk()});
  }
  Tensor head_index() const { return job_.head_index.narrow(1, 0, heads_); }

  const Job& job_;
  const Block& b_;
  std::int64_t first_head_, heads_;
};

// x [A G R, n, D] times a table that broadcasts over [A, G, R, n, 1].
Tensor weigh(const Tensor& x, const Tensor& table, const Part& p) {
  return x.view({p.rows(), p.heads(), p.ranks(), p.chunk(), -1}).mul(table).view(x.sizes());
}
// (a b^T) .* mask, [A G R, n, n]
Tensor masked_scores(const Tensor& a, const Tensor& b, const BlockDecay& d, const Part& p) {
  Tensor scores = at::bmm(a, b.mT());
  scores.view({p.rows(), p.heads(), p.ranks(), p.chunk(), p.chunk()}).mul_(d.mask_G1nn);
  return scores;
}

struct Scan {
  Tensor at_chunk;  // [A G R, K, V]: what reaches each chunk from outside it
  Tensor carried;   // [A, G, K, V]: what leaves the block
};

// Carries `state` [A, G, K, V] through the chunks whose own contributions are `own` [A G R, K, V];
// `back`: from the last chunk to the first. Sums of decayed terms only. The state itself moves by
// what it loses, expm1, so a decay of 4e-8 a token is not rounded away however short the pieces.
Scan scan(const Tensor& own, const Tensor& state, const BlockDecay& d, const Part& p, bool back) {
  const std::int64_t K = own.size(1), V = own.size(2), R = p.ranks();
  if (R == 1) {
    const Tensor change = own.view(state.sizes()).addcmul(state, d.lost);
    return {state.reshape({-1, K, V}), change.add_(state)};
  }
  const Tensor parts = own.view({p.rows() * p.heads(), R, K * V});
  const Tensor inside = at::bmm(back ? d.between_BRR.mT() : d.between_BRR, parts);
  const auto last = [&](const Tensor& x) {
    return x.select(1, back ? 0 : R - 1).view(state.sizes());
  };
  const Tensor change = last(parts).addcmul(last(inside), d.chunk_G11).addcmul_(state, d.lost);
  inside.view({p.rows(), p.heads(), R, K * V})
      .addcmul_(state.reshape({p.rows(), p.heads(), 1, K * V}),
                back ? d.chunks_GR1.flip(1) : d.chunks_GR1);
  return {inside.view({-1, K, V}), change.add_(state)};
}

struct Inputs {
  const Tensor &q, &k, &v;
};

// One part of the chunk form (README section 2), with a = from_start and w = to_end:
//   O = ((Q K^T) .* mask) V + diag(a) Q S,   S' = lambda^m S + (diag(w) K)^T V
// `states` [rows, H, K, V] moves on in place.
void forward_part(const Part& p, const DecayTables& tables, const Inputs& in, const Tensor& states,
                  const Tensor& out) {
  const BlockDecay d = p.decay(tables);
  const Tensor q = p.load(in.q), k = p.load(in.k), v = p.load(in.v), state = p.states(states);
  Tensor o = at::bmm(masked_scores(q, k, d, p), v);
  const Scan next = scan(at::bmm(weigh(k, d.to_end_G1n1, p).mT(), v), state, d, p, /*back=*/false);
  o.baddbmm_(weigh(q, d.from_start, p), next.at_chunk);
  state.copy_(next.carried);
  p.store(o, out);
}

struct Gradients {
  Tensor q, k, v;
};

// With G = (dO V^T) .* mask and R = dL/dS after the chunk:
//   dQ = G K + diag(a) dO S^T,  dK = G^T Q + diag(w) V R^T,  dV = ((Q K^T) .* mask)^T dO + diag(w)
//   K R R <- lambda^m R + (diag(a) Q)^T dO
// `before` is S before the block; `reverse` [rows, H, K, V] holds R and moves back in place.
void backward_part(const Part& p, const DecayTables& tables, const Inputs& in, const Tensor& grad_o,
                   const Tensor& before, const Tensor& reverse, const Gradients& out) {
  const BlockDecay d = p.decay(tables);
  const Tensor q = p.load(in.q), k = p.load(in.k), v = p.load(in.v), g = p.load(grad_o),
               R = p.states(reverse);
  const Tensor weighed_k = weigh(k, d.to_end_G1n1, p), weighed_g = weigh(g, d.from_start, p);
  const Tensor S = scan(at::bmm(weighed_k.mT(), v), before, d, p, /*back=*/false).at_chunk;
  const Scan after = scan(at::bmm(q.mT(), weighed_g), R, d, p, /*back=*/true);

  Tensor dv = at::bmm(masked_scores(q, k, d, p).mT(), g);
  dv.baddbmm_(weighed_k, after.at_chunk);
  p.store(dv, out.v);
  const Tensor grad_scores = masked_scores(g, v, d, p);
  Tensor dq = at::bmm(grad_scores, k);
  dq.baddbmm_(weighed_g, S.mT());
  p.store(dq, out.q);
  Tensor dk = at::bmm(grad_scores.mT(), q);
  dk.baddbmm_(weigh(v, d.to_end_G1n1, p), after.at_chunk.mT());
  p.store(dk, out.k);
  R.copy_(after.carried);
}

// Calls visit(part, index of its checkpoint) for every part: those of one batch and head group in
// the order of time or against it, the others at the same time on the CPU's threads.
template <class Visit>
void for_each_part(const Job& job, bool back, const Visit& visit) {
  const auto batches = static_cast<std::int64_t>(job.plan.batches.size()) - 1;
  const auto blocks = static_cast<std::int64_t>(job.plan.blocks.size());
  const std::int64_t groups = (job.heads + job.head_group - 1) / job.head_group;
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
  if (job.options.device().is_cpu())
    at::parallel_for(0, batches * groups, 1, run);
  else
    run(0, batches * groups);
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

Attention forward(const Job& job, const Inputs& in, const Tensor& state,
                  std::vector<Tensor>* checkpoints) {
  const Tensor states = to_rows(job, state), out = make_output(job, in.v);
  const DecayTables& tables = job.tables();
  if (checkpoints != nullptr)
    checkpoints->resize(
        job.plan.blocks.size() *
        static_cast<std::size_t>((job.heads + job.head_group - 1) / job.head_group));
  for_each_part(job, /*back=*/false, [&](const Part& part, std::size_t index) {
    if (checkpoints != nullptr) (*checkpoints)[index] = part.states(states).clone();
    forward_part(part, tables, in, states, out);
  });
  return {out.narrow(1, 0, in.v.size(1)), from_rows(job, states, state)};
}

struct ChunkForm : torch::autograd::Function<ChunkForm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& state,
                               const c10::intrusive_ptr<Job>& job) {
    std::vector<Tensor> checkpoints;
    const Attention result = lightning::forward(*job, {q, k, v}, state, &checkpoints);
    variable_list saved = {q, k, v};
    saved.insert(saved.end(), checkpoints.begin(), checkpoints.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = c10::IValue::make_capsule(job);
    return {result.o_BTHV, result.state_NHKV};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto holder = ctx->saved_data["job"].toCapsule();
    const Job& job = static_cast<const Job&>(*holder);
    const Inputs in{saved[0], saved[1], saved[2]};
    const Gradients out{make_output(job, in.q), make_output(job, in.k), make_output(job, in.v)};
    const Tensor reverse = to_rows(job, grads[1]);
    const DecayTables& tables = job.tables();
    for_each_part(job, /*back=*/true, [&](const Part& part, std::size_t index) {
      backward_part(part, tables, in, grads[0], saved[3 + index], reverse, out);
    });
    const auto cut = [&](const Tensor& x) { return x.narrow(1, 0, in.q.size(1)); };
    return {cut(out.q), cut(out.k), cut(out.v), from_rows(job, reverse, grads[1]), Tensor()};
  }
};

// One token for every sequence: the recurrence itself, by autograd.
Attention step(const Tensor& q, const Tensor& k, const Tensor& v, const Job& job,
               const Tensor& state) {
  const auto token = [&](const Tensor& x) { return x.select(1, 0).to(state.scalar_type()); };
  const Tensor lost = job.tables().lost_in_tokens_Hm.select(1, 1).view({-1, 1, 1});
  const Tensor change = at::addcmul(token(k).unsqueeze(-1) * token(v).unsqueeze(-2), state, lost);
  const Tensor next = state + change;
  const Tensor o = at::matmul((token(q) * job.decay.scale()).unsqueeze(-2), next);  // [B, H, 1, V]
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
  auto job = c10::make_intrusive<Job>(decay, state.options());
  set_limits(*job, q, v);
  if (cu_seqlens.empty() && q.size(1) == 1) return step(q, k, v, *job, state);
  job->plan = cu_seqlens.empty() ? plan_rows(q.size(0), q.size(1), job->limits)
                                 : plan_packed(cu_seqlens, job->limits);
  if (job->plan.packed()) {
    job->slots = at::tensor(job->plan.slot_token, at::kLong).to(q.device());
    job->order = at::tensor(job->plan.order, at::kLong).to(q.device());
    job->head_index = at::arange(job->head_group, job->slots.options()).view({1, -1, 1, 1});
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || state.requires_grad());
  if (!differentiate) return forward(*job, {q, k, v}, state, nullptr);
  const auto results = ChunkForm::apply(q, k, v, state, job);
  return {results[0], results[1]};
}

}  // namespace

Attention decay_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Decay& decay, at::IntArrayRef cu_seqlens,
                                 const std::optional<Tensor>& state_in) {
  throw_if_error(check_arguments(q, k, v, decay, cu_seqlens, state_in));
  const std::int64_t N =
      cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  const auto options = q.options().dtype(state_dtype(q.scalar_type()));
  const Tensor state = state_in.has_value()
                           ? state_in->to(options.dtype())
                           : at::zeros({N, q.size(2), q.size(3), v.size(3)}, options);
  if (q.size(1) == 0) return {at::empty_like(v), state.clone()};
  const auto length = cu_seqlens.empty() ? std::nullopt : common_length(cu_seqlens);
  if (!length.has_value()) return rows_or_packed(q, k, v, decay, cu_seqlens, state);
  const auto rows = [&](const Tensor& x) { return x.view({N, *length, x.size(2), x.size(3)}); };
  Attention result = rows_or_packed(rows(q), rows(k), rows(v), decay, {}, state);
  result.o_BTHV = result.o_BTHV.reshape(v.sizes());
  return result;
}

}  // namespace everlong::lightning
