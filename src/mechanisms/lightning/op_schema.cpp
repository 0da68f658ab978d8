#include <ATen/ops/empty.h>

#include <list>
#include <mutex>
#include <tuple>

#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/op_cuda.h"
#include "ops/schema.h"

namespace everlong::lightning {
namespace {

using at::Tensor;

// The Decay of these numbers, kept with its tables: a caller gives the same ones layer by layer,
// over and over.
Decay decay_of(at::ArrayRef<double> slope, double scale) {
  constexpr std::size_t kMost = 128;
  static std::mutex mutex;
  static std::list<Decay> kept;  // the last used first
  const std::lock_guard lock(mutex);
  for (auto i = kept.begin(); i != kept.end(); ++i)
    if (i->scale() == scale && slope.equals(i->slope())) {
      kept.splice(kept.begin(), kept, i);
      return kept.front();
    }
  kept.emplace_front(slope.vec(), scale);
  if (kept.size() > kMost) kept.pop_back();
  return kept.front();
}

std::tuple<Tensor, Tensor> compute(const Tensor& q, const Tensor& k, const Tensor& v,
                                   at::ArrayRef<double> slope, double scale,
                                   at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state) {
  auto result = decay_linear_attention(q, k, v, decay_of(slope, scale), cu_seqlens, state);
  return {std::move(result.o_BTHV), std::move(result.state_NHKV)};
}

std::tuple<Tensor, Tensor> shapes(const Tensor& q, const Tensor& k, const Tensor& v,
                                  at::ArrayRef<double> slope, double scale,
                                  at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state) {
  throw_if_error(check_arguments(q, k, v, Decay(slope.vec(), scale), cu_seqlens, state));
  const std::int64_t sequences =
      cu_seqlens.empty() ? q.size(0) : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  const auto accumulator = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::empty(v.sizes(), v.options()),
          at::empty({sequences, q.size(2), q.size(3), v.size(3)}, v.options().dtype(accumulator))};
}

// Empty tensors stand for what is not wanted: a schema has no optional results.
std::tuple<Tensor, Tensor, Tensor> fused(const Tensor& q, const Tensor& k, const Tensor& v,
                                         at::ArrayRef<double> slope, double scale,
                                         at::IntArrayRef cu_seqlens,
                                         const std::optional<Tensor>& state, bool silu_q,
                                         bool silu_k, bool silu_v, bool row_squares,
                                         bool final_state) {
  auto result =
      decay_linear_attention(q, k, v, decay_of(slope, scale), cu_seqlens, state, Path::kAuto,
                             {silu_q, silu_k, silu_v, row_squares, final_state});
  return {result.o_BTHV, or_empty(result.state_NHKV, v), or_empty(result.row_squares_BTH, v)};
}
std::tuple<Tensor, Tensor, Tensor> fused_shapes(const Tensor& q, const Tensor& k, const Tensor& v,
                                                at::ArrayRef<double> slope, double scale,
                                                at::IntArrayRef cu_seqlens,
                                                const std::optional<Tensor>& state, bool, bool,
                                                bool, bool row_squares, bool final_state) {
  const auto [o, all_states] = shapes(q, k, v, slope, scale, cu_seqlens, state);
  const auto options = all_states.options();
  return {o, final_state ? all_states : at::empty({0}, options),
          row_squares ? at::empty(v.sizes().slice(0, 3), options) : at::empty({0}, options)};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, at::ArrayRef<double> slope,
            double scale, const Tensor& state, const Tensor& ring_k, const Tensor& ring_v,
            const Tensor& waiting, const std::optional<Tensor>& slot) {
  return step_with_rings(q, k, v, decay_of(slope, scale),
                         {state, ring_k, ring_v, waiting, slot.value_or(Tensor())});
}
Tensor step_shape(const Tensor&, const Tensor&, const Tensor& v, at::ArrayRef<double>, double,
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const std::optional<Tensor>&) {
  return at::empty(v.sizes(), v.options());
}

void fold(at::ArrayRef<double> slope, const Tensor& state, const Tensor& ring_k,
          const Tensor& ring_v, const Tensor& waiting, const std::optional<Tensor>& slot) {
  step_with_rings({}, {}, {}, decay_of(slope, 1.0),
                  {state, ring_k, ring_v, waiting, slot.value_or(Tensor())});
}
void fold_shape(at::ArrayRef<double>, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const std::optional<Tensor>&) {}

}  // namespace

void register_schemas() {
  define_operator(
      "decay_linear_attention(Tensor q, Tensor k, Tensor v, float[] slope, float scale=1.0, "
      "int[] cu_seqlens=[], Tensor? state=None) -> (Tensor o, Tensor state_out)",
      compute, shapes);
  // With what layers do around it: struct Fusion in op.h.
  define_operator(
      "decay_linear_attention_fused(Tensor q, Tensor k, Tensor v, float[] slope, float scale=1.0, "
      "int[] cu_seqlens=[], Tensor? state=None, bool silu_q=False, bool silu_k=False, "
      "bool silu_v=False, bool row_squares=False, bool final_state=True) "
      "-> (Tensor o, Tensor state_out, Tensor row_squares)",
      fused, fused_shapes);
  // States written behind, on a GPU; op_cuda.h.
  define_operator(
      "decay_linear_attention_step(Tensor q, Tensor k, Tensor v, float[] slope, float scale, "
      "Tensor(a!) state, Tensor(b!) ring_k, Tensor(c!) ring_v, Tensor waiting, "
      "Tensor? slot=None) -> Tensor",
      step, step_shape);
  define_operator(
      "decay_linear_attention_fold(float[] slope, Tensor(a!) state, Tensor(b!) ring_k, "
      "Tensor(c!) ring_v, Tensor waiting, Tensor? slot=None) -> ()",
      fold, fold_shape);
}

}  // namespace everlong::lightning
