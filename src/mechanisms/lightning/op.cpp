#include "mechanisms/lightning/op.h"

#include <ATen/ATen.h>
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

PlanLimits limits_of(at::Device device) {
  if (device.is_cpu())
    return {.chunk = env("LN", 64), .group = env("LG", 8), .tokens = env("LT", 512)};
  return {.chunk = env("LN", 64), .group = env("LG", 64), .tokens = env("LT", 65536)};
}

at::ScalarType state_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// What one call needs to know besides its tensors; kept for the backward pass.
struct Job : torch::CustomClassHolder {
  Job(const Decay& decay_in, Plan plan_in) : decay(decay_in), plan(std::move(plan_in)) {}
  Decay decay;
  Plan plan;
  PlanLimits limits;
  at::TensorOptions options;  // of everything inside: the state's dtype
  Tensor slots, order;        // packed: on the device
  Tensor heads;               // packed: 0..H-1 as [1, H, 1, 1]

  const DecayTables& tables() const { return decay.tables(options, limits.chunk, limits.group); }
};

// The decays of one block, cut out of the tables. A is the block's rows, or 1 where all rows share
// the numbers.
struct BlockDecay {
  Tensor mask_H1nn, from_start_AH1n1, to_end_H1n1;
  Tensor lost_AH11;                // expm1(-s tokens of the block)
  Tensor between_BRR, chunks_HR1;  // several chunks: see DecayTables; B = A H
  Tensor chunk_H1;                 // exp(-s n)
};

struct BlockShape {
  std::int64_t rows, heads, ranks, chunk;
  std::int64_t batch() const { return rows * heads * ranks; }
};

class Blocks {
 public:
  Blocks(const Job& job, std::int64_t heads) : job_(job), heads_(heads) {}

  BlockShape shape(const Block& b) const { return {b.rows, heads_, b.ranks, b.chunk}; }

  // The block's tokens of x [B, T, H, D] as [A H R, n, D] in the working dtype; padding is zero.
  Tensor load(const Block& b, const Tensor& x) const {
    const std::int64_t dim = x.size(3);
    if (!job_.plan.packed()) {
      const Tensor view = x.narrow(0, b.row, b.rows).narrow(1, b.first, b.ranks * b.chunk);
      Tensor out = at::empty({b.rows, heads_, b.ranks, b.chunk, dim}, job_.options);
      out.copy_(view.view({b.rows, b.ranks, b.chunk, heads_, dim}).permute({0, 3, 1, 2, 4}));
      return out.view({-1, b.chunk, dim});
    }
    Tensor slots = slots_of(b), padding;
    if (!b.length.empty()) {
      padding = slots.eq(x.size(1));
      slots = slots.clamp_max(x.size(1) - 1);
    }
    Tensor out = at::index(x.select(0, 0), {slots, job_.heads}).to(job_.options.dtype());
    if (padding.defined()) out.masked_fill_(padding.unsqueeze(-1), 0);
    return out.view({-1, b.chunk, dim});
  }

  // The reverse; `out` is [B, T, H, D], packed: [1, T+1, H, D] whose last token takes the padding.
  void store(const Block& b, const Tensor& value, const Tensor& out) const {
    const std::int64_t dim = out.size(3);
    const Tensor v = value.view({b.rows, heads_, b.ranks, b.chunk, dim});
    if (!job_.plan.packed()) {
      out.narrow(0, b.row, b.rows)
          .narrow(1, b.first, b.ranks * b.chunk)
          .view({b.rows, b.ranks, b.chunk, heads_, dim})
          .copy_(v.permute({0, 2, 3, 1, 4}));
    } else {
      out.select(0, 0).index_put_({slots_of(b), job_.heads}, v.to(out.scalar_type()));
    }
  }

  Tensor make_output(const Tensor& like, std::int64_t dim) const {
    const std::int64_t spare = job_.plan.packed() ? 1 : 0;
    return at::empty({like.size(0), like.size(1) + spare, heads_, dim}, like.options());
  }

  BlockDecay decay(const Block& b) const {
    const DecayTables& t = job_.tables();
    BlockDecay d;
    d.mask_H1nn = t.mask_H1nn.narrow(2, 0, b.chunk).narrow(3, 0, b.chunk);
    d.from_start_AH1n1 = t.from_start_H1n1.narrow(2, 0, b.chunk);
    d.to_end_H1n1 = t.to_end_H1n1.narrow(2, t.chunk - b.chunk, b.chunk);
    if (!b.length.empty()) {
      const Tensor length = at::tensor(b.length, at::kLong).to(job_.options.device());
      const Tensor local =
          (at::arange(b.chunk, length.options()) - (b.chunk - length.unsqueeze(1))).clamp_min(0);
      d.from_start_AH1n1 = t.from_start_H1n1.view({heads_, -1})
                               .index_select(1, local.view(-1))
                               .view({heads_, b.rows, 1, b.chunk, 1})
                               .transpose(0, 1);
      d.lost_AH11 = t.lost_in_tokens_Hm.index_select(1, length).t().unsqueeze(-1).unsqueeze(-1);
    } else if (b.ranks == 1) {
      d.lost_AH11 = t.lost_in_tokens_Hm.select(1, b.chunk).view({1, heads_, 1, 1});
    } else {
      d.lost_AH11 = t.lost_in_chunks_Hr.select(1, b.ranks).view({1, heads_, 1, 1});
      d.between_BRR = t.between_HRR.narrow(1, 0, b.ranks)
                          .narrow(2, 0, b.ranks)
                          .expand({b.rows, heads_, b.ranks, b.ranks})
                          .reshape({-1, b.ranks, b.ranks});
      d.chunks_HR1 = t.chunks_HR1.narrow(1, 0, b.ranks);
      d.chunk_H1 = t.chunks_HR1.select(1, 1);
    }
    return d;
  }

 private:
  Tensor slots_of(const Block& b) const {
    return job_.slots.narrow(0, b.first, b.rows * b.ranks * b.chunk)
        .view({b.rows, 1, b.ranks, b.chunk});
  }
  const Job& job_;
  std::int64_t heads_;
};

// x [A H R, n, D] times a table that broadcasts over [A, H, R, n, 1].
Tensor weigh(const Tensor& x, const Tensor& table, const BlockShape& s) {
  return x.view({s.rows, s.heads, s.ranks, s.chunk, -1}).mul(table).view(x.sizes());
}
// (a b^T) .* mask, [A H R, n, n]
Tensor masked_scores(const Tensor& a, const Tensor& b, const BlockDecay& d, const BlockShape& s) {
  Tensor scores = at::bmm(a, b.mT());
  scores.view({s.rows, s.heads, s.ranks, s.chunk, s.chunk}).mul_(d.mask_H1nn);
  return scores;
}

struct Scan {
  Tensor at_chunk;  // [A H R, K, V]: what reaches each chunk from outside it
  Tensor carried;   // [A, H, K, V]: what leaves the block
};

// Carries `state` through the chunks whose own contributions are `own` [A H R, K, V]; `back`: from
// the last chunk to the first. Sums of decayed terms only. The state itself moves by what it loses,
// expm1, so a decay of 4e-8 a token is not rounded away however short the pieces.
Scan scan(const Tensor& own, const Tensor& state, const BlockDecay& d, const BlockShape& s,
          bool back) {
  const std::int64_t K = own.size(1), V = own.size(2);
  if (s.ranks == 1) {
    const Tensor change = own.view(state.sizes()).addcmul(state, d.lost_AH11);
    return {state.reshape({-1, K, V}), change.add_(state)};
  }
  const std::int64_t AH = s.rows * s.heads;
  const Tensor parts = own.view({AH, s.ranks, K * V});
  Tensor inside = at::bmm(back ? d.between_BRR.mT() : d.between_BRR, parts);
  const std::int64_t last = back ? 0 : s.ranks - 1;
  const auto rows = [&](const Tensor& x) {
    return x.select(1, last).view({s.rows, s.heads, K, V});
  };
  Tensor change = rows(parts)
                      .addcmul(rows(inside), d.chunk_H1.view({1, s.heads, 1, 1}))
                      .addcmul_(state, d.lost_AH11);
  inside.view({s.rows, s.heads, s.ranks, K * V})
      .addcmul_(state.view({s.rows, s.heads, 1, K * V}),
                back ? d.chunks_HR1.flip(1) : d.chunks_HR1);
  return {inside.view({-1, K, V}), change.add_(state)};
}

// One block of the chunk form (README section 2), with a = from_start and w = to_end:
//   O = ((Q K^T) .* mask) V + diag(a) Q S,   S' = lambda^m S + (diag(w) K)^T V
// `states` [rows, H, K, V] moves on in place.
void forward_block(const Blocks& blocks, const Block& b, const Tensor& q_in, const Tensor& k_in,
                   const Tensor& v_in, const Tensor& states, const Tensor& out) {
  const BlockDecay d = blocks.decay(b);
  const BlockShape s = blocks.shape(b);
  const Tensor q = blocks.load(b, q_in), k = blocks.load(b, k_in), v = blocks.load(b, v_in);
  Tensor o = at::bmm(masked_scores(q, k, d, s), v);
  Tensor state = states.narrow(0, b.row, b.rows);
  const Scan next = scan(at::bmm(weigh(k, d.to_end_H1n1, s).mT(), v), state, d, s, false);
  o.baddbmm_(weigh(q, d.from_start_AH1n1, s), next.at_chunk);
  state.copy_(next.carried);
  blocks.store(b, o, out);
}

struct Gradients {
  Tensor q, k, v;
};

// With G = (dO V^T) .* mask and R = dL/dS after the chunk:
//   dQ = G K + diag(a) dO S^T,  dK = G^T Q + diag(w) V R^T,  dV = ((Q K^T) .* mask)^T dO + diag(w)
//   K R R <- lambda^m R + (diag(a) Q)^T dO
// `state` is S before the block; `reverse` [rows, H, K, V] holds R and moves back in place.
void backward_block(const Blocks& blocks, const Block& b, const Tensor& q_in, const Tensor& k_in,
                    const Tensor& v_in, const Tensor& grad_o, const Tensor& state,
                    const Tensor& reverse, const Gradients& out) {
  const BlockDecay d = blocks.decay(b);
  const BlockShape s = blocks.shape(b);
  const Tensor q = blocks.load(b, q_in), k = blocks.load(b, k_in), v = blocks.load(b, v_in);
  const Tensor g = blocks.load(b, grad_o);
  const Tensor weighed_k = weigh(k, d.to_end_H1n1, s), weighed_g = weigh(g, d.from_start_AH1n1, s);
  const Tensor states = scan(at::bmm(weighed_k.mT(), v), state, d, s, false).at_chunk;
  Tensor R = reverse.narrow(0, b.row, b.rows);
  const Scan before = scan(at::bmm(q.mT(), weighed_g), R, d, s, true);

  const Tensor scores = masked_scores(q, k, d, s);
  Tensor dv = at::bmm(scores.mT(), g);
  dv.baddbmm_(weighed_k, before.at_chunk);
  blocks.store(b, dv, out.v);
  const Tensor grad_scores = masked_scores(g, v, d, s);
  Tensor dq = at::bmm(grad_scores, k);
  dq.baddbmm_(weighed_g, states.mT());
  blocks.store(b, dq, out.q);
  Tensor dk = at::bmm(grad_scores.mT(), q);
  dk.baddbmm_(weigh(v, d.to_end_H1n1, s), before.at_chunk.mT());
  blocks.store(b, dk, out.k);
  R.copy_(before.carried);
}

// states [N, ...] <-> rows of the plan.
Tensor to_rows(const Job& job, const Tensor& states) {
  return job.plan.packed() ? states.index_select(0, job.order)
                           : states.clone(at::MemoryFormat::Contiguous);
}
Tensor from_rows(const Job& job, const Tensor& rows, const Tensor& states) {
  return job.plan.packed() ? states.index_copy(0, job.order, rows) : rows;
}

Attention forward(const Job& job, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& state, std::vector<Tensor>* checkpoints) {
  const Blocks blocks(job, q.size(2));
  Tensor states = to_rows(job, state);
  const Tensor out = blocks.make_output(v, v.size(3));
  for (const Block& b : job.plan.blocks) {
    if (checkpoints != nullptr) checkpoints->push_back(states.narrow(0, b.row, b.rows).clone());
    forward_block(blocks, b, q, k, v, states, out);
  }
  return {out.narrow(1, 0, v.size(1)), from_rows(job, states, state)};
}

struct ChunkForm : torch::autograd::Function<ChunkForm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& state,
                               const c10::intrusive_ptr<Job>& job) {
    variable_list saved = {q, k, v};
    std::vector<Tensor> checkpoints;
    const Attention result = lightning::forward(*job, q, k, v, state, &checkpoints);
    saved.insert(saved.end(), checkpoints.begin(), checkpoints.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = c10::IValue::make_capsule(job);
    return {result.o_BTHV, result.state_NHKV};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto holder = ctx->saved_data["job"].toCapsule();
    const Job& job = static_cast<const Job&>(*holder);
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const Blocks blocks(job, q.size(2));
    const Gradients out{blocks.make_output(q, q.size(3)), blocks.make_output(k, k.size(3)),
                        blocks.make_output(v, v.size(3))};
    const Tensor reverse = to_rows(job, grads[1]);
    for (std::size_t i = job.plan.blocks.size(); i-- > 0;)
      backward_block(blocks, job.plan.blocks[i], q, k, v, grads[0], saved[3 + i], reverse, out);
    const auto cut = [&](const Tensor& x) { return x.narrow(1, 0, q.size(1)); };
    return {cut(out.q), cut(out.k), cut(out.v), from_rows(job, reverse, grads[1]), Tensor()};
  }
};

// One token for every sequence: the recurrence itself, by autograd.
Attention step(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
               const Tensor& state, const PlanLimits& limits) {
  const auto options = state.options();
  const auto token = [&](const Tensor& x) { return x.select(1, 0).to(options.dtype()); };
  const Tensor lost = decay.tables(options, limits.chunk, limits.group)
                          .lost_in_tokens_Hm.select(1, 1)
                          .view({-1, 1, 1});
  const Tensor change = at::addcmul(token(k).unsqueeze(-1) * token(v).unsqueeze(-2), state, lost);
  const Tensor next = state + change;
  const Tensor o = at::matmul((token(q) * decay.scale()).unsqueeze(-2), next);  // [B, H, 1, V]
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
  const PlanLimits limits = limits_of(q.device());
  if (cu_seqlens.empty() && q.size(1) == 1) return step(q, k, v, decay, state, limits);
  auto job =
      c10::make_intrusive<Job>(decay, cu_seqlens.empty() ? plan_rows(q.size(0), q.size(1), limits)
                                                         : plan_packed(cu_seqlens, limits));
  job->limits = limits;
  job->options = state.options();
  if (job->plan.packed()) {
    job->slots = at::tensor(job->plan.slot_token, at::kLong).to(q.device());
    job->order = at::tensor(job->plan.order, at::kLong).to(q.device());
    job->heads = at::arange(q.size(2), job->slots.options()).view({1, -1, 1, 1});
  }
  const bool differentiate =
      at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || state.requires_grad());
  if (!differentiate) return forward(*job, q, k, v, state, nullptr);
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
