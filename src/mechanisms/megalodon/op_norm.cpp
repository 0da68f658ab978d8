// Timestep norm in ATen.
#include <ATen/ATen.h>

#include "mechanisms/megalodon/op.h"
#include "mechanisms/megalodon/op_rows.h"

namespace everlong::megalodon {
namespace {

// n_t for each row and token, [N, T, 1] fp64.
at::Tensor counts_after(const NormState& state, std::int64_t tokens, at::Device device) {
  const at::Tensor before =
      at::tensor(state.counts, at::kLong).to(device).to(at::kDouble).view({-1, 1, 1});
  return before + at::arange(1, tokens + 1, before.options()).view({1, tokens, 1});
}

NormState moved_on(const NormState& state, std::int64_t tokens, at::Tensor mean, at::Tensor var) {
  NormState next{state.counts, std::move(mean), std::move(var)};
  for (auto& count : next.counts) count += tokens;
  return next;
}

at::Tensor scaled(const at::Tensor& x_BTGd, const at::Tensor& mean, const at::Tensor& var,
                  const at::Tensor& weight, const at::Tensor& bias, double eps,
                  at::ScalarType dtype) {
  const at::Tensor rstd = (var + eps).rsqrt().unsqueeze(-1).to(dtype);
  const at::Tensor plain = ((x_BTGd - mean.unsqueeze(-1).to(dtype)) * rstd).flatten(2);
  return at::addcmul(bias.to(dtype), plain, weight.to(dtype) + 1);
}

}  // namespace

NormState fresh_norm_state(std::int64_t sequences, std::int64_t groups, at::Device device) {
  const auto zeros = [&] {
    return at::zeros({sequences, groups}, at::TensorOptions().dtype(at::kDouble).device(device));
  };
  return {std::vector<std::int64_t>(static_cast<std::size_t>(sequences), 0), zeros(), zeros()};
}

// mu_t by a sum of means; then every token's share of the variance is known, (1 - 1/n) D1^2 + S:
// two sums over time of positive numbers, nothing cancels.
Normalised composite_timestep_norm(const at::Tensor& x_BTD, const at::Tensor& weight,
                                   const at::Tensor& bias, double eps, const NormState& state) {
  const std::int64_t T = x_BTD.size(1), G = state.mean_NG.size(1);
  if (T == 0) return {x_BTD.clone(), state};
  const auto dtype = working_dtype(x_BTD);
  const at::Tensor x = x_BTD.to(dtype).unflatten(2, {G, x_BTD.size(2) / G});
  const auto [var_token, mean_token] = at::var_mean(x, at::IntArrayRef{-1}, /*correction=*/0);
  const at::Tensor A = mean_token.to(at::kDouble), S = var_token.to(at::kDouble);
  const at::Tensor n = counts_after(state, T, x.device());
  const at::Tensor before = (n.narrow(1, 0, 1) - 1);  // n_0
  const at::Tensor mean0 = state.mean_NG.unsqueeze(1), var0 = state.var_NG.unsqueeze(1);
  // Sums of differences from a value near the data, so that large means keep their digits. The
  // result does not depend on it, hence no gradient.
  const at::Tensor shift = at::where(before > 0, mean0, A.narrow(1, 0, 1)).detach();
  const at::Tensor mean = shift + (before * (mean0 - shift) + (A - shift).cumsum(1)) / n;
  const at::Tensor step = A - at::cat({mean0, mean.narrow(1, 0, T - 1)}, 1);
  const at::Tensor share = at::addcmul(S, (1 - n.reciprocal()) * step, step);
  const at::Tensor var = (before * var0 + share.cumsum(1)) / n;
  return {scaled(x, mean, var, weight, bias, eps, dtype).to(x_BTD.scalar_type()),
          moved_on(state, T, mean.select(1, T - 1).clone(), var.select(1, T - 1).clone())};
}

Normalised naive_timestep_norm(const at::Tensor& x_BTD, const at::Tensor& weight,
                               const at::Tensor& bias, double eps, const NormState& state) {
  const std::int64_t T = x_BTD.size(1), G = state.mean_NG.size(1);
  if (T == 0) return {x_BTD.clone(), state};
  const auto dtype = working_dtype(x_BTD);
  const at::Tensor x = x_BTD.to(dtype).unflatten(2, {G, x_BTD.size(2) / G});
  const at::Tensor n = counts_after(state, T, x.device()).to(dtype), before = n.narrow(1, 0, 1) - 1;
  const at::Tensor mean0 = state.mean_NG.unsqueeze(1).to(dtype),
                   var0 = state.var_NG.unsqueeze(1).to(dtype);
  const at::Tensor triangle = at::ones({T, T}, x.options()).tril();
  // Around a value near the data: second moments of large means cancel.
  const at::Tensor shift =
      at::where(before > 0, mean0, x.narrow(1, 0, 1).mean(-1)).detach();  // [N, 1, G]
  const at::Tensor off = x - shift.unsqueeze(-1), off0 = mean0 - shift;
  const at::Tensor first = at::matmul(triangle, off.mean(-1)),
                   second = at::matmul(triangle, off.square().mean(-1));
  const at::Tensor off_mean = (before * off0 + first) / n, mean = shift + off_mean;
  const at::Tensor var = (before * (var0 + off0.square()) + second) / n - off_mean.square();
  return {scaled(x, mean, var, weight, bias, eps, dtype).to(x_BTD.scalar_type()),
          moved_on(state, T, mean.select(1, T - 1).to(at::kDouble),
                   var.select(1, T - 1).to(at::kDouble))};
}

}  // namespace everlong::megalodon
