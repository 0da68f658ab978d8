#include "mechanisms/infini/op_parts.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

namespace everlong::infini {

void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                   const Options& options) {
  Params p;
  p.options = options;
  const auto shape = [](const at::Tensor& x) { return Shape(x.sizes().data(), x.sizes().size()); };
  throw_if_error(read_shapes(shape(q), shape(k), shape(v), p));
  throw_if_error(validate(p));
  TORCH_CHECK_VALUE(q.is_floating_point() && q.scalar_type() == k.scalar_type() &&
                        q.scalar_type() == v.scalar_type() && q.device() == k.device() &&
                        q.device() == v.device(),
                    "infini: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ",
                    v.scalar_type(), " on ", q.device(), ", ", k.device(), ", ", v.device(),
                    "; one floating-point dtype and one device are needed");
  TORCH_CHECK_VALUE(!beta.defined() || beta.numel() == 1 || beta.numel() == p.heads ||
                        beta.numel() == p.heads * p.value_dim,
                    "infini: beta has ", beta.defined() ? beta.numel() : 0,
                    " numbers; 1 (a layer), ", p.heads, " (a head) or ", p.heads * p.value_dim,
                    " (a channel) are needed");
  TORCH_CHECK_VALUE(!weight.defined() || weight.sizes() == q.sizes().slice(0, 2),
                    "infini: weight has shape ", weight.sizes(), "; [", p.batch, ", ", p.tokens,
                    "] is needed");
  const std::int64_t open = before.open();
  TORCH_CHECK_VALUE(open < options.segment, "infini: ", open, " open tokens in segments of ",
                    options.segment, "; fewer are needed");
  const auto fits = [](const at::Tensor& x, std::vector<std::int64_t> sizes) {
    return !x.defined() || x.sizes() == at::IntArrayRef(sizes);
  };
  TORCH_CHECK_VALUE(fits(before.M_NGKV, {p.batch, p.kv_heads, p.key_dim, p.value_dim}) &&
                        fits(before.z_NGK, {p.batch, p.kv_heads, p.key_dim}) &&
                        before.M_NGKV.defined() == before.z_NGK.defined() &&
                        fits(before.k_NFGK, {p.batch, open, p.kv_heads, p.key_dim}) &&
                        fits(before.v_NFGV, {p.batch, open, p.kv_heads, p.value_dim}) &&
                        fits(before.weight_NF, {p.batch, open}),
                    "infini: what is carried does not fit a call of ", p.batch, " sequences, ",
                    p.kv_heads, " key/value heads, key dim ", p.key_dim, " and value dim ",
                    p.value_dim);
}

bool is_cut(const Options& options, std::int64_t number) {
  return options.bptt_segments > 0 && number > 0 && number % options.bptt_segments == 0;
}

at::Tensor joined_weights(const at::Tensor& open, const at::Tensor& fresh, std::int64_t batch,
                          std::int64_t opened, std::int64_t tokens) {
  if (!open.defined() && !fresh.defined()) return {};
  const at::Tensor& like = fresh.defined() ? fresh : open;
  const auto wide =
      like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor a = open.defined() ? open.to(wide) : at::ones({batch, opened}, wide);
  const at::Tensor b = fresh.defined() ? fresh.to(wide) : at::ones({batch, tokens}, wide);
  return at::cat({a, b}, 1).detach();
}

Carried carried_on(const Carried& before, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& weight, std::int64_t closed, const Options& options) {
  Carried after;
  after.segment_number = before.segment_number + closed;
  const std::int64_t rows = k.size(1), begin = std::min(closed * options.segment, rows);
  const auto open = [&](const at::Tensor& x) { return x.narrow(1, begin, rows - begin).clone(); };
  after.k_NFGK = open(k);
  after.v_NFGV = open(v);
  if (weight.defined() && weight.size(1) == rows) after.weight_NF = open(weight);
  return after;
}

Turns::Turns(const Options& options, std::int64_t key_dim, std::int64_t rows,
             const at::Tensor& like) {
  if (options.rope == Rope::kNone) return;
  std::vector<std::int64_t> positions(static_cast<std::size_t>(rows));
  std::iota(positions.begin(), positions.end(), std::int64_t{0});
  const auto pairs =
      options.rope == Rope::kInterleaved ? RopePairs::kInterleaved : RopePairs::kHalfSplit;
  table_ = make_rope_table(positions, 1, rope_frequencies(options.rope_theta, key_dim), pairs,
                           like.scalar_type(), like.device());
}

at::Tensor Turns::turn(const at::Tensor& x, std::int64_t first) const {
  if (!table_.cos.defined() || x.size(1) == 0) return x;
  const std::int64_t axis = table_.cos.dim() - 2;
  return apply_rope(x, {table_.cos.narrow(axis, first, x.size(1)),
                        table_.sin.narrow(axis, first, x.size(1)), table_.pairs});
}

}  // namespace everlong::infini
