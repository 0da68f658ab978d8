// Cases and comparisons that the laws share.
#pragma once
#include <ATen/ATen.h>

#include "core/text.h"
#include "ops/operator.h"
#include "support/compare.h"
#include "support/tolerance.h"

namespace everlong::laws {

// Lengths around every block size in use, and the two degenerate ones.
inline constexpr std::int64_t kLengths[] = {0, 1, 63, 64, 65, 1000};

struct Run {  // one form on one device in one dtype
  const OpForm* form;
  at::ScalarType dtype;
};

inline std::vector<Run> runs_on(const std::vector<OpForm>& forms, at::Device device) {
  std::vector<Run> runs;
  for (const OpForm& form : forms) {
    if (device.is_cpu() ? !form.cpu : !form.cuda) continue;
    if (form.float64) runs.push_back({&form, at::kDouble});
    if (!form.low_precision) continue;
    runs.push_back({&form, at::kFloat});
    runs.push_back({&form, at::kBFloat16});
  }
  return runs;
}

// The room's own law shapes at this length, each also with an initial state.
inline std::vector<OpShape> shapes_of(const Operator& op, std::int64_t tokens) {
  std::vector<OpShape> shapes = op.law_shapes();
  shapes.insert(shapes.begin(), OpShape{});
  std::vector<OpShape> out;
  for (OpShape shape : shapes) {
    if (!shape.cu_seqlens.empty()) continue;  // packed_shapes()
    shape.tokens = tokens;
    shape.batch = 2;
    for (const bool initial : {false, true}) {
      shape.initial_state = initial;
      shape.seed = out.size() + 1;
      out.push_back(shape);
    }
  }
  return out;
}

inline OpShape packed_shape(std::uint64_t seed) {
  OpShape shape;
  shape.cu_seqlens = {0, 5, 5, 6, 70, 199};
  shape.tokens = 199;
  shape.initial_state = true;
  shape.seed = seed;
  return shape;
}

// One packed line with empty and short sequences, and those of the room.
inline std::vector<OpShape> packed_shapes(const Operator& op) {
  std::vector<OpShape> out = {packed_shape(7)};
  for (const OpShape& shape : op.law_shapes())
    if (!shape.cu_seqlens.empty()) out.push_back(shape);
  return out;
}

// The call with its floating tensors in `dtype` on `device`; what selects or scales (integers) only
// moves.
inline OpCall cast(const Operator& op, const OpCall& call, at::Device device,
                   at::ScalarType dtype) {
  OpCall out = call;
  out.inputs = test::to(call.inputs, device, dtype);
  out.state = test::to(call.state, device, op.state_dtype(dtype));
  out.grad_out = test::to(call.grad_out, device, dtype);
  return out;
}

// What the float64 reference makes of the very values that a low-precision form was given.
inline Result<OpResult> truth(const Operator& op, const OpCall& given) {
  return op.run(op.forms().front().name, cast(op, given, at::kCPU, at::kDouble));
}

inline void seed_all(std::uint64_t seed) { at::manual_seed(seed); }

// Random incoming gradients for every output and final state of the call, the same for every form:
// randn_like would fill them in the order of the output's strides.
inline TensorMap random_gradients(const OpResult& result) {
  TensorMap grad_out;
  for (const auto& [name, t] : result.out) grad_out[name] = at::randn(t.sizes(), t.options());
  for (const auto& [name, t] : result.state)
    if (t.is_floating_point()) grad_out["state." + name] = at::randn(t.sizes(), t.options());
  return grad_out;
}

// Everything a result holds under one roof: "out.o", "state.S", "grad.q".
inline TensorMap flat(const OpResult& result) {
  TensorMap all;
  for (const auto& [name, t] : result.out) all["out." + name] = t;
  for (const auto& [name, t] : result.state) all["state." + name] = t;
  for (const auto& [name, t] : result.grad) all["grad." + name] = t;
  return all;
}

inline std::string label(const Operator& op, const Run& run, const OpShape& shape) {
  return cat(op.kind(), " ", run.form->name, " ", run.dtype, " B", shape.batch, " T", shape.tokens,
             " H", shape.heads, "/", shape.kv_heads, " K", shape.key_dim, " V", shape.value_dim,
             shape.initial_state ? " +state" : "", shape.cu_seqlens.empty() ? "" : " packed", " ",
             shape.params.dump());
}

}  // namespace everlong::laws
