#include "mechanisms/softmax/op.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>

#include "mechanisms/softmax/params.h"

namespace everlong::softmax {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kFloor = -1e30;  // below any score, yet finite: a row that saw nothing so far must not give inf - inf

// How the work is cut. Legend of the folded tensors: M = B G matrices; a row is (token, head of the group), T R rows.
struct Plan {
  std::int64_t matrices, tokens, group, keys, window;
  double scale;
  at::ScalarType operand, wide;      // of the products' operands, and of their results and the softmax
  std::int64_t rows, columns, together;  // tokens and keys of a block of scores, and matrices it spans

  std::int64_t first_row_key(std::int64_t t) const { return keys - tokens + t; }
};

// CPU: 64 rows waste least beyond the diagonal (256 rows were 30 to 60 % slower at T = 256, equal at 4096), and 1 MB of
// scores stays in a core's L2 through its five passes. GPU: blocks large enough to fill it, 256 MB of scores.
constexpr std::int64_t kCpuRows = 64, kCpuColumns = 512, kCpuScores = std::int64_t{1} << 18;
constexpr std::int64_t kGpuRows = 1024, kGpuColumns = 4096, kGpuScores = std::int64_t{1} << 26;

Plan plan(const at::Tensor& q_MRK, const at::Tensor& k_MSK, std::int64_t group, std::int64_t window, double scale) {
  Plan p{};
  p.matrices = q_MRK.size(0);
  p.group = group;
  p.tokens = q_MRK.size(1) / group;
  p.keys = k_MSK.size(1);
  p.window = window;
  p.scale = scale;
  p.wide = q_MRK.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // The CPU multiplies low precision in fp32: without AMX its bf16 products are several times slower.
  const bool gpu = q_MRK.is_cuda();
  p.operand = gpu ? q_MRK.scalar_type() : p.wide;
  p.rows = std::min(p.tokens, std::max<std::int64_t>((gpu ? kGpuRows : kCpuRows) / group, 1));
  // A few rows (decoding) take as many scores a block, not as many columns.
  const std::int64_t fullness = (gpu ? kGpuRows : kCpuRows) / std::max<std::int64_t>(p.rows * group, 1);
  p.columns = (gpu ? kGpuColumns : kCpuColumns) * std::max<std::int64_t>(fullness, 1);
  const std::int64_t scores = std::max<std::int64_t>(p.rows * group * std::min(p.columns, p.keys), 1);
  p.together = std::clamp<std::int64_t>((gpu ? kGpuScores : kCpuScores) / scores, 1, std::max<std::int64_t>(p.matrices, 1));
  return p;
}

// Some tokens of some matrices, and the keys that any of them sees.
struct Block {
  std::int64_t matrix, matrices, token, tokens, key_begin, key_end;
};

std::vector<Block> blocks(const Plan& p) {
  std::vector<Block> list;
  for (std::int64_t m = 0; m < p.matrices; m += p.together)
    for (std::int64_t t = 0; t < p.tokens; t += p.rows) {
      const std::int64_t count = std::min(p.rows, p.tokens - t);
      const std::int64_t end = std::max<std::int64_t>(p.first_row_key(t + count), 0);
      const std::int64_t begin =
          p.window > 0 ? std::clamp<std::int64_t>(p.first_row_key(t) - p.window + 1, 0, end) : 0;
      list.push_back({m, std::min(p.together, p.matrices - m), t, count, begin, end});
    }
  return list;
}

// Makes blocks of scores with what a row does not see at -inf. Holds the scratch of the whole walk.
class Scores {
 public:
  Scores(const Plan& p, const at::TensorOptions& options) : p_(p) {
    const auto wide = options.dtype(p.wide);
    const std::int64_t width = std::min(p.columns, p.keys);
    scratch_ = at::empty({p.together * p.rows * p.group * width}, wide);
    const at::Tensor hidden = at::full({p.rows, std::max<std::int64_t>(p.rows - 1, 0)}, -kInfinity, wide);
    future_ = hidden.triu(0);
    forgotten_ = hidden.tril(-1);
  }

  // a [m, rows, D] times b [m, columns, D] transposed, into scratch: valid until the next call.
  at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
    at::Tensor s = scratch_.narrow(0, 0, a.size(0) * a.size(1) * b.size(1)).view({a.size(0), a.size(1), b.size(1)});
    if (p_.operand == p_.wide) {
      at::bmm_out(s, a, b.mT());
    } else {
      at::bmm_out(s, a, b.mT(), p_.wide);
    }
    return s;
  }

  // Scaled scores of a block's rows and the keys [begin, begin + k.size(1)).
  at::Tensor make(const Block& block, const at::Tensor& q, const at::Tensor& k, std::int64_t begin) {
    // Scaling the rows is the smaller pass, and exact enough unless they are low precision.
    const at::Tensor s = p_.operand == p_.wide ? product(q * p_.scale, k) : product(q, k).mul_(p_.scale);
    // Row i sits at key `own` + i. The keys own + 1 + j are the future of rows i <= j; the keys own - window + 1 + j
    // have left the window of rows i > j. Only these two bands need a mask.
    const std::int64_t own = p_.first_row_key(block.token);
    hide(s, block, future_, own + 1, begin);
    if (p_.window > 0) hide(s, block, forgotten_, own - p_.window + 1, begin);
    return s;
  }

 private:
  void hide(const at::Tensor& s, const Block& block, const at::Tensor& mask, std::int64_t band, std::int64_t begin) {
    const std::int64_t from = std::max(band, begin);
    const std::int64_t to = std::min(band + block.tokens - 1, begin + s.size(2));
    if (from >= to) return;
    s.view({s.size(0), block.tokens, p_.group, s.size(2)})
        .narrow(3, from - begin, to - from)
        .add_(mask.narrow(0, 0, block.tokens).narrow(1, from - band, to - from).unsqueeze(1));
  }

  const Plan& p_;
  at::Tensor scratch_, future_, forgotten_;
};

at::Tensor rows_of(const at::Tensor& x_MRD, const Block& block, const Plan& p) {
  return x_MRD.narrow(0, block.matrix, block.matrices).narrow(1, block.token * p.group, block.tokens * p.group);
}

at::Tensor keys_of(const at::Tensor& x_MSD, const Block& block, std::int64_t begin, std::int64_t count) {
  return x_MSD.narrow(0, block.matrix, block.matrices).narrow(1, begin, count);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, const Plan& p) {
  return p.operand == p.wide ? at::bmm(a, b) : at::bmm(a, b, p.wide);
}

// Online softmax (2205.14135, algorithm 1) over tiles of keys, then one division.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_MRK, const at::Tensor& k_MSK,
                            const at::Tensor& v_MSV, std::int64_t group, std::int64_t window, double scale) {
    const Plan p = plan(q_MRK, k_MSK, group, window, scale);
    at::Tensor out = at::empty({q_MRK.size(0), q_MRK.size(1), v_MSV.size(2)}, q_MRK.options());
    at::Tensor lse = at::empty({q_MRK.size(0), q_MRK.size(1), 1}, q_MRK.options().dtype(p.wide));
    Scores scores(p, q_MRK.options());
    for (const Block& block : blocks(p)) {
      const at::Tensor q = rows_of(q_MRK, block, p).to(p.operand);
      at::Tensor top, sum, weighted;  // running maximum, sum of exp, and sum of exp times v
      for (std::int64_t s = block.key_begin; s < block.key_end; s += p.columns) {
        const std::int64_t count = std::min(p.columns, block.key_end - s);
        const at::Tensor v = keys_of(v_MSV, block, s, count).to(p.operand);
        const at::Tensor e = scores.make(block, q, keys_of(k_MSK, block, s, count).to(p.operand), s);
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
      const at::Tensor blind = sum == 0;
      to.copy_(weighted.div_(sum.masked_fill(blind, 1)));
      to_lse.copy_(top.add_(sum.log()).masked_fill_(blind, kInfinity));  // +inf: probabilities of 0 in the backward
    }
    ctx->save_for_backward({q_MRK, k_MSK, v_MSV, out, lse});
    ctx->saved_data["group"] = group;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  // P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q_MRK = saved[0], &k_MSK = saved[1], &v_MSV = saved[2], &out = saved[3], &lse = saved[4];
    const Plan p = plan(q_MRK, k_MSK, ctx->saved_data["group"].toInt(), ctx->saved_data["window"].toInt(),
                        ctx->saved_data["scale"].toDouble());
    const auto wide = q_MRK.options().dtype(p.wide);
    at::Tensor dq = at::zeros(q_MRK.sizes(), wide), dk = at::zeros(k_MSK.sizes(), wide),
               dv = at::zeros(v_MSV.sizes(), wide);
    Scores scores(p, q_MRK.options()), slopes(p, q_MRK.options());
    for (const Block& block : blocks(p)) {
      const at::Tensor q = rows_of(q_MRK, block, p).to(p.operand);
      const at::Tensor go = rows_of(grads[0], block, p).to(p.operand);
      const at::Tensor along = (go.to(p.wide) * rows_of(out, block, p)).sum(-1, true);
      at::Tensor to_dq = rows_of(dq, block, p);
      for (std::int64_t s = block.key_begin; s < block.key_end; s += p.columns) {
        const std::int64_t count = std::min(p.columns, block.key_end - s);
        const at::Tensor k = keys_of(k_MSK, block, s, count).to(p.operand);
        const at::Tensor v = keys_of(v_MSV, block, s, count).to(p.operand);
        const at::Tensor probability = scores.make(block, q, k, s).sub_(rows_of(lse, block, p)).exp_();
        const at::Tensor slope =
            slopes.product(go, v).sub_(along).mul_(probability).to(p.operand);
        keys_of(dv, block, s, count).add_(product(probability.to(p.operand).mT(), go, p));
        keys_of(dk, block, s, count).add_(product(slope.mT(), q, p));
        to_dq.add_(product(slope, k, p));
      }
    }
    const auto dtype = q_MRK.scalar_type();
    return {dq.mul_(p.scale).to(dtype), dk.mul_(p.scale).to(dtype), dv.to(dtype), {}, {}, {}};
  }
};

double checked_scale(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options& options) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
                        k.sizes().slice(0, 3) == v.sizes().slice(0, 3) && q.size(3) == k.size(3),
                    "softmax: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
                    " do not fit; [B, T, H, K], [B, S, G, K], [B, S, G, V] are needed");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                        q.is_floating_point() && q.device() == k.device() && q.device() == v.device(),
                    "softmax: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type(), " on ",
                    q.device(), ", ", k.device(), ", ", v.device(),
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

}  // namespace

at::Tensor attention(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK, const at::Tensor& v_BSGV,
                     const Options& options) {
  const double scale = checked_scale(q_BTHK, k_BSGK, v_BSGV, options);
  const std::int64_t B = q_BTHK.size(0), T = q_BTHK.size(1), H = q_BTHK.size(2), S = k_BSGK.size(1),
                     G = k_BSGK.size(2), R = H / G, K = q_BTHK.size(3), V = v_BSGV.size(3);
  // The heads of a group become rows of one matrix, so that keys and values are never repeated.
  const at::Tensor q = q_BTHK.unflatten(2, {G, R}).permute({0, 2, 1, 3, 4}).reshape({B * G, T * R, K});
  const at::Tensor k = k_BSGK.transpose(1, 2).reshape({B * G, S, K});
  const at::Tensor v = v_BSGV.transpose(1, 2).reshape({B * G, S, V});
  const at::Tensor out = AttentionFunction::apply(q, k, v, R, options.window, scale);
  return out.view({B, G, T, R, V}).permute({0, 2, 1, 3, 4}).reshape({B, T, H, V});
}

at::Tensor attention_packed(const at::Tensor& q_1THK, const at::Tensor& k_1TGK, const at::Tensor& v_1TGV,
                            std::span<const std::int64_t> offsets, const Options& options) {
  const Status status = check_offsets(offsets, q_1THK.size(1));
  TORCH_CHECK_VALUE(status.ok() && q_1THK.size(0) == 1, status.ok() ? "softmax: packed sequences need B = 1"
                                                                    : status.message());
  std::vector<at::Tensor> parts;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    const std::int64_t begin = offsets[n], count = offsets[n + 1] - begin;
    if (count == 0) continue;
    parts.push_back(attention(q_1THK.narrow(1, begin, count), k_1TGK.narrow(1, begin, count),
                              v_1TGV.narrow(1, begin, count), options));
  }
  return parts.empty() ? attention(q_1THK, k_1TGK, v_1TGV, options) : at::cat(parts, 1);
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
  return at::matmul(p, v).transpose(1, 2);
}

}  // namespace everlong::softmax
