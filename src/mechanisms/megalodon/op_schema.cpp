#include <ATen/ops/empty.h>

#include <tuple>

#include "mechanisms/megalodon/op_rows.h"
#include "ops/schema.h"

namespace everlong::megalodon {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

std::int64_t sequences(const Tensor& x, at::IntArrayRef cu_seqlens) {
  return cu_seqlens.empty() ? x.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
}

// Counts without statistics, or the other way round, are half a state.
NormState state_of(const Tensor& x, std::int64_t groups, at::IntArrayRef cu_seqlens,
                   at::IntArrayRef counts, const Maybe& mean, const Maybe& var) {
  throw_if_error(check_norm(x.size(2), groups, 0));
  const std::int64_t N = sequences(x, cu_seqlens);
  if (counts.empty() && !mean && !var) return fresh_norm_state(N, groups, x.device());
  if (static_cast<std::int64_t>(counts.size()) != N || !mean || !var ||
      mean->sizes() != at::IntArrayRef({N, groups}) || var->sizes() != mean->sizes())
    throw_if_error(invalid_argument("everlong::timestep_norm: a state is ", N,
                                    " counts with mean and var [", N, ", ", groups,
                                    "]; give all of it or nothing"));
  return {counts.vec(), mean->to(at::kDouble), var->to(at::kDouble)};
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        std::int64_t groups, double eps, at::IntArrayRef cu_seqlens,
                                        at::IntArrayRef counts, const Maybe& mean,
                                        const Maybe& var) {
  Normalised out = timestep_norm(x, weight, bias, eps, cu_seqlens,
                                 state_of(x, groups, cu_seqlens, counts, mean, var));
  return {std::move(out.y_BTD), std::move(out.state.mean_NG), std::move(out.state.var_NG)};
}

std::tuple<Tensor, Tensor, Tensor> norm_shapes(const Tensor& x, const Tensor&, const Tensor&,
                                               std::int64_t groups, double,
                                               at::IntArrayRef cu_seqlens, at::IntArrayRef,
                                               const Maybe&, const Maybe&) {
  const auto statistics = [&] {
    return at::empty({sequences(x, cu_seqlens), groups}, x.options().dtype(at::kDouble));
  };
  return {at::empty(x.sizes(), x.options()), statistics(), statistics()};
}

std::tuple<Tensor, Tensor> average(const Tensor& x, const Tensor& alpha, const Tensor& delta,
                                   const Tensor& theta, const Tensor& gamma, const Tensor& omega,
                                   at::IntArrayRef cu_seqlens, const Maybe& h) {
  Averaged out = cema(x, {alpha, delta, theta, gamma, omega}, cu_seqlens, h.value_or(Tensor()));
  return {std::move(out.y_BTD), std::move(out.h_NDM2)};
}

std::tuple<Tensor, Tensor> average_shapes(const Tensor& x, const Tensor& alpha, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          at::IntArrayRef cu_seqlens, const Maybe&) {
  return {at::empty(x.sizes(), x.options()),
          at::empty({sequences(x, cu_seqlens), x.size(2), alpha.size(1), 2},
                    x.options().dtype(working_dtype(x)))};
}

ChunkCache cache_of(const Tensor& z, const Tensor& v, at::IntArrayRef cu_seqlens,
                    at::IntArrayRef counts, const Maybe& cache_k, const Maybe& cache_v) {
  const std::int64_t N = sequences(z, cu_seqlens);
  if (counts.empty() && !cache_k && !cache_v) return empty_cache(N, z, v);
  if (static_cast<std::int64_t>(counts.size()) != N || !cache_k || !cache_v ||
      cache_k->size(0) != N || cache_v->size(0) != N)
    throw_if_error(invalid_argument("everlong::chunk_attention: a state is ", N,
                                    " counts with cache_k and cache_v of ", N,
                                    " sequences; give all of it or nothing"));
  return {counts.vec(), *cache_k, *cache_v};
}

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& z, const Tensor& v, const Tensor& gamma,
                                             const Tensor& beta, std::int64_t chunk_size,
                                             double rope_base, double eps,
                                             at::IntArrayRef cu_seqlens, at::IntArrayRef counts,
                                             const Maybe& cache_k, const Maybe& cache_v) {
  throw_if_error(check_attention(z.size(2), z.size(3), v.size(3), chunk_size, rope_base, eps));
  Attended out = chunk_attention(z, v, gamma, beta, {chunk_size, rope_base, eps}, cu_seqlens,
                                 cache_of(z, v, cu_seqlens, counts, cache_k, cache_v));
  return {std::move(out.o_BTHV), std::move(out.cache.k_NPHK), std::move(out.cache.v_NPHV)};
}

std::tuple<Tensor, Tensor, Tensor> attention_shapes(const Tensor& z, const Tensor& v, const Tensor&,
                                                    const Tensor&, std::int64_t chunk_size, double,
                                                    double, at::IntArrayRef cu_seqlens,
                                                    at::IntArrayRef counts, const Maybe&,
                                                    const Maybe&) {
  const std::int64_t N = sequences(z, cu_seqlens);
  std::int64_t rows = 0;
  for (std::int64_t n = 0; n < N; ++n) {
    const auto at = static_cast<std::size_t>(n);
    const std::int64_t past = counts.empty() ? 0 : counts[at],
                       length =
                           cu_seqlens.empty() ? z.size(1) : cu_seqlens[at + 1] - cu_seqlens[at];
    rows = std::max(rows, (past + length) % chunk_size);
  }
  return {at::empty(v.sizes(), v.options()),
          at::empty({N, rows, z.size(2), z.size(3)}, z.options()),
          at::empty({N, rows, v.size(2), v.size(3)}, v.options())};
}

}  // namespace

void register_schemas() {
  define_operator(
      "timestep_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-05, "
      "int[] cu_seqlens=[], int[] counts=[], Tensor? mean=None, Tensor? var=None) -> "
      "(Tensor y, Tensor mean_out, Tensor var_out)",
      norm, norm_shapes);
  define_operator(
      "cema(Tensor x, Tensor alpha, Tensor delta, Tensor theta, Tensor gamma, Tensor omega, "
      "int[] cu_seqlens=[], Tensor? h=None) -> (Tensor y, Tensor h_out)",
      average, average_shapes);
  define_operator(
      "chunk_attention(Tensor z, Tensor v, Tensor gamma, Tensor beta, int chunk_size, "
      "float rope_base=10000., float eps=1e-05, int[] cu_seqlens=[], int[] counts=[], "
      "Tensor? cache_k=None, Tensor? cache_v=None) -> (Tensor o, Tensor cache_k_out, "
      "Tensor cache_v_out)",
      attention, attention_shapes);
}

}  // namespace everlong::megalodon
