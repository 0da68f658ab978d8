#include "mechanisms/softmax/op.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/offsets.h"
#include "mechanisms/softmax/op_blocks.h"
#include "mechanisms/softmax/op_cpu.h"
#include "mechanisms/softmax/op_cuda.h"
#include "mechanisms/softmax/params.h"
#include "ops/causal_attention.h"

namespace everlong::softmax {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Below any score, yet finite: a row that saw nothing so far must not give inf - inf.
constexpr double kFloor = -1e30;

// Online softmax (2205.14135, algorithm 1) over tiles of keys, then one division.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_MRK, const at::Tensor& k_MSK,
                            const at::Tensor& v_MSV, std::int64_t group, std::int64_t window,
                            double scale) {
    const Plan p = make_plan(q_MRK, k_MSK, group, window, scale);
    at::Tensor out = at::empty({q_MRK.size(0), q_MRK.size(1), v_MSV.size(2)}, q_MRK.options());
    at::Tensor lse = at::empty({q_MRK.size(0), q_MRK.size(1), 1}, q_MRK.options().dtype(p.wide));
    Scores scores(p, q_MRK.options());
    for (const Block& block : make_blocks(p)) {
      const at::Tensor q = rows_of(q_MRK, block, p).to(p.operand);
      at::Tensor top, sum, weighted;  // running maximum, sum of exp, and sum of exp times v
      for (std::int64_t s = block.key_begin; s < block.key_end; s += p.columns) {
        const std::int64_t count = std::min(p.columns, block.key_end - s);
        const at::Tensor v = keys_of(v_MSV, block, s, count).to(p.operand);
        const at::Tensor e =
            scores.make(block, q, keys_of(k_MSK, block, s, count).to(p.operand), s);
        at::Tensor tile_top = e.amax(-1, true).clamp_min_(kFloor);
        if (top.defined()) tile_top = at::maximum(tile_top, top);
        e.sub_(tile_top).exp_();
        const at::Tensor tile_sum = e.sum(-1, true), tile_weighted = product(e.to(p.operand), v, p);
        if (top.defined()) {
          const at::Tensor fade = top.sub_(tile_top).exp_();
          sum.mul_(fade).add_(tile_sum);
          weighted.mul_(fade).add_(tile_weighted);
        } else {
          sum = tile_sum;
          weighted = tile_weighted;
        }
        top = tile_top;
      }
      at::Tensor to = rows_of(out, block, p), to_lse = rows_of(lse, block, p);
      if (!top.defined()) {  // all of these tokens lie before the first key
        to.zero_();
        to_lse.fill_(kInfinity);
        continue;
      }
      const at::Tensor blind = sum == 0;  // such a row is 0, and so are its probabilities backward
      to.copy_(weighted.div_(sum.masked_fill(blind, 1)));
      to_lse.copy_(top.add_(sum.log()).masked_fill_(blind, kInfinity));
    }
    ctx->save_for_backward({q_MRK, k_MSK, v_MSV, out, lse});
    ctx->saved_data["group"] = group;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  // P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T
  // Q.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q_MRK = saved[0], &k_MSK = saved[1], &v_MSV = saved[2], &out = saved[3],
                     &lse = saved[4];
    const Plan p =
        make_plan(q_MRK, k_MSK, ctx->saved_data["group"].toInt(), ctx->saved_data["window"].toInt(),
                  ctx->saved_data["scale"].toDouble());
    const auto wide = q_MRK.options().dtype(p.wide);
    at::Tensor dq = at::zeros(q_MRK.sizes(), wide), dk = at::zeros(k_MSK.sizes(), wide),
               dv = at::zeros(v_MSV.sizes(), wide);
    Scores scores(p, q_MRK.options()), slopes(p, q_MRK.options());
    for (const Block& block : make_blocks(p)) {
      const at::Tensor q = rows_of(q_MRK, block, p).to(p.operand);
      const at::Tensor go = rows_of(grads[0], block, p).to(p.operand);
      const at::Tensor along = (go.to(p.wide) * rows_of(out, block, p)).sum(-1, true);
      at::Tensor to_dq = rows_of(dq, block, p);
      for (std::int64_t s = block.key_begin; s < block.key_end; s += p.columns) {
        const std::int64_t count = std::min(p.columns, block.key_end - s);
        const at::Tensor k = keys_of(k_MSK, block, s, count).to(p.operand);
        const at::Tensor v = keys_of(v_MSV, block, s, count).to(p.operand);
        const at::Tensor probability =
            scores.make(block, q, k, s).sub_(rows_of(lse, block, p)).exp_();
        const at::Tensor slope = slopes.product(go, v).sub_(along).mul_(probability).to(p.operand);
        keys_of(dv, block, s, count).add_(product(probability.to(p.operand).mT(), go, p));
        keys_of(dk, block, s, count).add_(product(slope.mT(), q, p));
        to_dq.add_(product(slope, k, p));
      }
    }
    const auto dtype = q_MRK.scalar_type();
    return {dq.mul_(p.scale).to(dtype), dk.mul_(p.scale).to(dtype), dv.to(dtype), {}, {}, {}};
  }
};

double checked_scale(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const Options& options) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
                        k.sizes().slice(0, 3) == v.sizes().slice(0, 3) && q.size(3) == k.size(3),
                    "softmax: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
                    " do not fit; [B, T, H, K], [B, S, G, K], [B, S, G, V] are needed");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                        q.is_floating_point() && q.device() == k.device() &&
                        q.device() == v.device(),
                    "softmax: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ",
                    v.scalar_type(), " on ", q.device(), ", ", k.device(), ", ", v.device(),
                    "; one floating-point dtype and one device are needed");
  Params params;
  params.heads = q.size(2);
  params.kv_heads = k.size(2);
  params.key_dim = q.size(3);
  params.value_dim = v.size(3);
  params.window = options.window;
  params.scale = options.scale.value_or(default_scale(std::max<std::int64_t>(q.size(3), 1)));
  const Status status = validate(params);
  TORCH_CHECK_VALUE(status.ok(), status.message());
  return params.scale;
}

// What runs a call: kCuda, kCpu or kComposite. Throws where the path that was asked for cannot.
Path chosen_path(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 std::span<const std::int64_t> offsets, const Options& options) {
  if (options.path == Path::kComposite) return Path::kComposite;
  const bool cuda = options.path == Path::kAuto ? q.is_cuda() : options.path == Path::kCuda;
  const Status status = cuda ? check_flash(q, k, v, offsets) : check_cpu_kernel(q, k, v);
  if (options.path != Path::kAuto) throw_if_error(status);
  return !status.ok() ? Path::kComposite : cuda ? Path::kCuda : Path::kCpu;
}

at::Tensor composite(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                     std::int64_t window, double scale) {
  const std::int64_t B = q_BTHK.size(0), T = q_BTHK.size(1), H = q_BTHK.size(2), S = k_BSGK.size(1),
                     G = k_BSGK.size(2), R = H / G, K = q_BTHK.size(3), V = v_BSGV.size(3);
  // The heads of a group become rows of one matrix, so that keys and values are never repeated.
  const at::Tensor q =
      q_BTHK.unflatten(2, {G, R}).permute({0, 2, 1, 3, 4}).reshape({B * G, T * R, K});
  const at::Tensor k = k_BSGK.transpose(1, 2).reshape({B * G, S, K});
  const at::Tensor v = v_BSGV.transpose(1, 2).reshape({B * G, S, V});
  const at::Tensor out = AttentionFunction::apply(q, k, v, R, window, scale);
  return out.view({B, G, T, R, V}).permute({0, 2, 1, 3, 4}).contiguous().view({B, T, H, V});
}

}  // namespace

std::string_view path_taken(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Options& options) {
  const Path path = chosen_path(q, k, v, {}, options);
  return path == Path::kCuda ? "cuda flash" : path == Path::kCpu ? "cpu" : "composite";
}

at::Tensor attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                     const Options& options) {
  const double scale = checked_scale(q_BTHK, k_BSGK, v_BSGV, options);
  const Path path = chosen_path(q_BTHK, k_BSGK, v_BSGV, {}, options);
  return path == Path::kCuda ? attention_by_flash(q_BTHK, k_BSGK, v_BSGV, {}, options.window, scale)
         : path == Path::kCpu
             ? attention_by_cpu_kernel(q_BTHK, k_BSGK, v_BSGV, {}, options.window, scale)
             : composite(q_BTHK, k_BSGK, v_BSGV, options.window, scale);
}

at::Tensor attention_packed(const at::Tensor& q_1THK, const at::Tensor& k_1TGK,
                            const at::Tensor& v_1TGV, std::span<const std::int64_t> offsets,
                            const Options& options) {
  const double scale = checked_scale(q_1THK, k_1TGK, v_1TGV, options);
  throw_if_error(check_offsets(offsets, q_1THK.size(0), q_1THK.size(1)).at("softmax"));
  TORCH_CHECK_VALUE(!offsets.empty() && k_1TGK.size(1) == q_1THK.size(1),
                    "softmax: packed sequences need offsets and a key for each token");
  const Path path = chosen_path(q_1THK, k_1TGK, v_1TGV, offsets, options);
  if (path == Path::kCuda)
    return attention_by_flash(q_1THK, k_1TGK, v_1TGV, offsets, options.window, scale);
  if (path == Path::kCpu)
    return attention_by_cpu_kernel(q_1THK, k_1TGK, v_1TGV, offsets, options.window, scale);
  std::vector<at::Tensor> parts;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    const std::int64_t begin = offsets[n], count = offsets[n + 1] - begin;
    if (count == 0) continue;
    parts.push_back(composite(q_1THK.narrow(1, begin, count), k_1TGK.narrow(1, begin, count),
                              v_1TGV.narrow(1, begin, count), options.window, scale));
  }
  return parts.empty() ? composite(q_1THK, k_1TGK, v_1TGV, options.window, scale)
                       : at::cat(parts, 1);
}

at::Tensor naive(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                 const Options& options) {
  const double scale = checked_scale(q_BTHK, k_BSGK, v_BSGV, options);
  const std::int64_t T = q_BTHK.size(1), S = k_BSGK.size(1), R = q_BTHK.size(2) / k_BSGK.size(2);
  const at::Tensor q = q_BTHK.transpose(1, 2);  // [B, H, T, K]
  const at::Tensor k = k_BSGK.repeat_interleave(R, 2).transpose(1, 2);
  const at::Tensor v = v_BSGV.repeat_interleave(R, 2).transpose(1, 2);
  const auto integers = q_BTHK.options().dtype(at::kLong);
  const at::Tensor own = at::arange(S - T, S, integers).unsqueeze(1), key = at::arange(S, integers);
  at::Tensor hidden = key > own;
  if (options.window > 0) hidden = hidden.logical_or(key <= own - options.window);
  const at::Tensor scores = at::matmul(q, k.mT()).mul(scale).masked_fill(hidden, -kInfinity);
  // A row of -inf alone has no softmax: a token that sees no key gives 0.
  const at::Tensor blind = hidden.all(-1, true);
  const at::Tensor p = at::softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0);
  return at::matmul(p, v).transpose(1, 2).contiguous();
}

}  // namespace everlong::softmax

namespace everlong {

at::Tensor causal_attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                            const at::Tensor& v_BSGV, double scale, bool kernels) {
  using softmax::Path;
  return softmax::attention(q_BTHK, k_BSGK, v_BSGV,
                            {.scale = scale, .path = kernels ? Path::kAuto : Path::kComposite});
}

}  // namespace everlong
