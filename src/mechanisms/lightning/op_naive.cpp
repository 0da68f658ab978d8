#include <ATen/ATen.h>

#include "mechanisms/lightning/op.h"

namespace everlong::lightning {
namespace {

using at::Tensor;

// All rows at once: q, k [B, T, H, K], v [B, T, H, V], state [B, H, K, V] in the state's dtype.
Attention one_length(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                     const Tensor& slope_H, double scale, const Tensor& state) {
  const auto dtype = q_in.scalar_type();
  // Contiguous first: matmul picks another path for strided inputs, whose bits differ.
  const Tensor q = q_in.transpose(1, 2).contiguous(), k = k_in.transpose(1, 2).contiguous(),
               v = v_in.transpose(1, 2).contiguous();
  const std::int64_t T = q.size(2);
  const Tensor token = at::arange(T, slope_H.options()), slope = slope_H.view({-1, 1, 1});
  const auto decay = [&](const Tensor& tokens_between) {
    return at::exp(-slope * tokens_between).to(dtype);
  };

  const Tensor between = (token.unsqueeze(1) - token).clamp_min(0);
  const Tensor mask = decay(between).tril() * scale;
  const Tensor from_start = decay((token + 1).unsqueeze(1)) * scale,
               to_end = decay((T - 1 - token).unsqueeze(1));
  const Tensor o =
      at::matmul(at::matmul(q, k.mT()) * mask, v) + at::matmul(q * from_start, state.to(dtype));
  const Tensor kept = at::exp(-slope * static_cast<double>(T)).to(state.scalar_type());
  const Tensor next = state * kept + at::matmul((k * to_end).mT(), v).to(state.scalar_type());
  return {o.transpose(1, 2).contiguous(), next};
}

}  // namespace

Attention naive(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state_in) {
  throw_if_error(check_arguments(q, k, v, decay, cu_seqlens, state_in));
  const auto dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const std::int64_t N =
      cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  const Tensor state = state_in.has_value() ? state_in->to(dtype)
                                            : at::zeros({N, q.size(2), q.size(3), v.size(3)},
                                                        q.options().dtype(dtype));
  const Tensor slope = at::tensor(decay.slope(), at::kDouble).to(q.device());
  if (cu_seqlens.empty()) return one_length(q, k, v, slope, decay.scale(), state);
  std::vector<Tensor> outs, states;
  for (std::int64_t n = 0; n < N; ++n) {
    const auto from = cu_seqlens[static_cast<std::size_t>(n)],
               end = cu_seqlens[static_cast<std::size_t>(n) + 1];
    const auto part = [&](const Tensor& x) { return x.narrow(1, from, end - from); };
    const Attention one =
        one_length(part(q), part(k), part(v), slope, decay.scale(), state.narrow(0, n, 1));
    outs.push_back(one.o_BTHV);
    states.push_back(one.state_NHKV);
  }
  return {at::cat(outs, 1), at::cat(states, 0)};
}

}  // namespace everlong::lightning
