// One operator of a room seen from outside: what the laws, golden_check and the benchmark need to
// know of it.
//
// Tensors travel by the names that everlong-golden-1 files use (docs/formats.md), so a golden file,
// a law and a benchmark case are all an OpCall.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong {

using TensorMap = std::map<std::string, at::Tensor>;

struct OpCall {
  TensorMap inputs;  // "q", "k", "v", "slope", ... [B, T, H, D] unless the room says otherwise
  TensorMap state;   // "S", ...; empty: the fresh state
  std::vector<std::int64_t> cu_seqlens;  // N+1 offsets, B = 1; empty: B sequences of T tokens
  nlohmann::json params = nlohmann::json::object();  // scalars and flags
  // Incoming gradients by output name ("o") and, for final states, "state.<name>". Empty: no
  // gradients wanted.
  TensorMap grad_out;
};

struct OpResult {
  TensorMap out;    // "o"
  TensorMap state;  // final state
  // Gradients of sum <out, grad_out> by input name ("q") and, for the initial state,
  // "state.<name>".
  TensorMap grad;
};

// What a random case for the laws and the benchmark looks like.
struct OpShape {
  std::int64_t batch = 1, tokens = 64, heads = 2, kv_heads = 2, key_dim = 16, value_dim = 16;
  std::vector<std::int64_t> cu_seqlens = {};  // then batch = 1 and tokens = cu_seqlens.back()
  bool initial_state = false;
  std::uint64_t seed = 0;
  nlohmann::json params =
      nlohmann::json::object();  // overrides of the room's own parameters, e.g. {"window": 8}
};

struct OpForm {
  std::string name;  // "reference", "naive", "composite", "cpu", "cuda"
  bool cpu = true, cuda = false;
  bool low_precision = false;  // takes bf16 and fp32
  bool float64 = true;         // takes fp64
};

struct OpCost {
  double flops = 0, bytes = 0;  // fewest of both that the pass needs: each input read once, each
                                // output written once
};

class Operator {
 public:
  virtual ~Operator() = default;
  virtual std::string_view kind() const = 0;  // the golden kind: "decay_linear_attention"

  // forms()[0] is the float64 reference. A sequence operator also has "naive", the plain quadratic
  // form in any dtype: the yardstick of law 1.
  virtual std::vector<OpForm> forms() const = 0;
  // Runs one form. Refuses bad input before any work. Thread safe.
  virtual Result<OpResult> run(std::string_view form, const OpCall& call) const = 0;

  // False for a function without tokens (slopes): the laws leave it to golden_check.
  virtual bool is_sequence() const { return true; }

  // The rest is asked of sequence operators only.
  // Random double tensors on the CPU: inputs, and a state when shape.initial_state.
  virtual OpCall sample(const OpShape& shape) const = 0;
  // The dtype of a state's floating tensors for inputs of `dtype`: accumulators are fp32, fp64 for
  // fp64.
  virtual at::ScalarType state_dtype(at::ScalarType dtype) const {
    return dtype == at::kDouble ? at::kDouble : at::kFloat;
  }
  // Inputs whose dimension 1 is the token; the others are shared by every piece of a split.
  virtual std::vector<std::string> token_inputs() const = 0;
  // Inputs that callers keep in float64 on the CPU whatever the others are (slopes).
  virtual std::vector<std::string> host_inputs() const { return {}; }
  virtual std::vector<OpShape> law_shapes()
      const = 0;  // shapes beyond the common ones: dk != dv, GQA, windows, ...
  // Calls that must be refused before any work, each with a name: unsupported dims, dtypes,
  // offsets, shapes.
  virtual std::vector<std::pair<std::string, OpCall>> refusals() const = 0;
  // pass: "forward", "train" (forward and backward), "step" (one token after shape.tokens).
  virtual OpCost cost(const OpShape& shape, std::string_view pass,
                      std::size_t element_bytes) const = 0;
};

// Runs `forward` (inputs, state -> outputs, final state) and differentiates it by autograd as
// call.grad_out asks: how every form that is made of ATen operations implements Operator::run.
using OpFunction = std::function<OpResult(const TensorMap& inputs, const TensorMap& state)>;
OpResult run_by_autograd(const OpCall& call, const OpFunction& forward);

// Throws the torch error that stands for a failed Status. The one place where a Status becomes an
// exception.
void throw_if_error(const Status& status);

}  // namespace everlong
