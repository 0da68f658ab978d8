#include "mechanisms/lightning/op_call.h"

#include <ATen/ATen.h>

#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/op_cpu.h"
#include "mechanisms/lightning/reference.h"
#include "ops/reference_call.h"

namespace everlong::lightning {
namespace {

using at::Tensor;

constexpr std::int64_t kReferenceChunk = 64;
// Beyond this length the reference takes its chunk form: the quadratic one would need minutes, and
// they agree to 1e-12.
constexpr std::int64_t kLongestParallel = 2048;

// The tensors of a call by name, present and of a sensible kind; the rest is check_arguments'
// business.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> state;
  std::optional<Decay> decay;
  Fusion fusion;
};

// params silu: the letters of the inputs that it turns, "qk"; row_squares: wanted.
Result<Fusion> fusion_of(const nlohmann::json& params) {
  Fusion fusion;
  const auto silu = params.find("silu"), squares = params.find("row_squares");
  if (silu != params.end()) {
    if (!silu->is_string() ||
        silu->get_ref<const std::string&>().find_first_not_of("qkv") != std::string::npos)
      return invalid_argument("lightning: silu = ", silu->dump(),
                              " is not allowed; some of the letters q, k, v are, as \"qk\"");
    const auto has = [&](char input) {
      return silu->get_ref<const std::string&>().find(input) != std::string::npos;
    };
    fusion.silu_q = has('q'), fusion.silu_k = has('k'), fusion.silu_v = has('v');
  }
  if (squares != params.end()) {
    if (!squares->is_boolean())
      return invalid_argument("lightning: row_squares = ", squares->dump(),
                              " is not allowed; true or false is");
    fusion.row_squares = squares->get<bool>();
  }
  return fusion;
}

Result<Arguments> arguments_of(const OpCall& call) {
  for (const auto& [name, t] : call.inputs)
    if (name != "q" && name != "k" && name != "v" && name != "slope")
      return invalid_argument("lightning: \"", name, "\" is not an input; q, k, v, slope are");
  for (const char* name : {"q", "k", "v", "slope"})
    if (!call.inputs.contains(name))
      return invalid_argument("lightning: input ", name, " is missing");
  for (const auto& [name, t] : call.state)
    if (name != "S")
      return invalid_argument("lightning: \"", name, "\" is no state; the state is S [N, H, K, V]");
  const Tensor& slope = call.inputs.at("slope");
  if (slope.dim() != 1 || !slope.is_floating_point())
    return invalid_argument("lightning: slope is ", slope.scalar_type(), " ", slope.sizes(),
                            "; floating numbers [H], one per head, are needed");
  const auto scale = call.params.find("scale");
  if (scale != call.params.end() && !scale->is_number())
    return invalid_argument("lightning: scale = ", scale->dump(),
                            " is not allowed; a finite number is needed");
  EVERLONG_ASSIGN(const Fusion fusion, fusion_of(call.params));
  Arguments a{call.inputs.at("q"), call.inputs.at("k"), call.inputs.at("v"),
              std::nullopt,        std::nullopt,        fusion};
  if (call.state.contains("S")) a.state = call.state.at("S");
  a.decay.emplace(to_doubles(slope), scale == call.params.end() ? 1.0 : scale->get<double>());
  EVERLONG_RETURN_IF_ERROR(check_arguments(a.q, a.k, a.v, *a.decay, call.cu_seqlens, a.state));
  return a;
}

enum class ReferenceForm { kParallel, kChunked, kRecurrent };

Result<OpResult> run_reference(ReferenceForm form, const OpCall& call, const Arguments& a) {
  EVERLONG_RETURN_IF_ERROR(require_reference_input(a.q, "lightning", "reference"));
  const Fusion& fusion = a.fusion;
  const auto q = to_doubles(silu_where(fusion.silu_q, a.q)),
             k = to_doubles(silu_where(fusion.silu_k, a.k)),
             v = to_doubles(silu_where(fusion.silu_v, a.v));
  const auto state = a.state.has_value() ? to_doubles(*a.state) : std::vector<double>();
  const reference::Input in{.shape = {.batch = a.q.size(0),
                                      .tokens = a.q.size(1),
                                      .heads = a.q.size(2),
                                      .key_dim = a.q.size(3),
                                      .value_dim = a.v.size(3),
                                      .cu_seqlens = call.cu_seqlens},
                            .q_BTHK = q,
                            .k_BTHK = k,
                            .v_BTHV = v,
                            .slope_H = a.decay->slope(),
                            .scale = a.decay->scale(),
                            .state_NHKV = state};
  if (form == ReferenceForm::kParallel && in.shape.tokens > kLongestParallel)
    form = ReferenceForm::kChunked;
  const std::vector<std::int64_t> states = {in.shape.sequences(), a.q.size(2), a.q.size(3),
                                            a.v.size(3)};
  EVERLONG_ASSIGN(const auto out, form == ReferenceForm::kParallel ? reference::parallel(in)
                                  : form == ReferenceForm::kChunked
                                      ? reference::chunked(in, kReferenceChunk)
                                      : reference::recurrent(in));
  OpResult result;
  result.out["o"] = from_doubles(out.o_BTHV, a.v.sizes());
  result.state["S"] = from_doubles(out.state_NHKV, states);
  if (fusion.row_squares) result.out["row_squares"] = row_squares(result.out["o"]);
  if (call.grad_out.empty()) return result;

  EVERLONG_ASSIGN(auto grad_o, incoming_gradient(call, "o", a.v.sizes(), "lightning"));
  const auto squares = call.grad_out.find("row_squares");
  if (fusion.row_squares && squares != call.grad_out.end()) {
    const Tensor own = 2 * squares->second.unsqueeze(-1) * result.out["o"];
    grad_o = to_doubles(grad_o.empty() ? own : from_doubles(grad_o, a.v.sizes()) + own);
  }
  EVERLONG_ASSIGN(const auto grad_state, incoming_gradient(call, "state.S", states, "lightning"));
  EVERLONG_ASSIGN(const auto grad,
                  form == ReferenceForm::kParallel
                      ? reference::parallel_gradient(in, grad_o, grad_state)
                  : form == ReferenceForm::kChunked
                      ? reference::chunked_gradient(in, kReferenceChunk, grad_o, grad_state)
                      : reference::recurrent_gradient(in, grad_o, grad_state));
  result.grad["q"] = grad_before_silu(fusion.silu_q, from_doubles(grad.q_BTHK, a.q.sizes()), a.q);
  result.grad["k"] = grad_before_silu(fusion.silu_k, from_doubles(grad.k_BTHK, a.k.sizes()), a.k);
  result.grad["v"] = grad_before_silu(fusion.silu_v, from_doubles(grad.v_BTHV, a.v.sizes()), a.v);
  if (a.state.has_value()) result.grad["state.S"] = from_doubles(grad.state_NHKV, states);
  return result;
}

using TensorForm = Attention (*)(const Tensor&, const Tensor&, const Tensor&, const Decay&,
                                 at::IntArrayRef, const std::optional<Tensor>&, const Fusion&);

template <Path path>
Attention by_path(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                  at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state,
                  const Fusion& fusion) {
  return decay_linear_attention(q, k, v, decay, cu_seqlens, state, path, fusion);
}
Attention by_definition(const Tensor& q, const Tensor& k, const Tensor& v, const Decay& decay,
                        at::IntArrayRef cu_seqlens, const std::optional<Tensor>& state,
                        const Fusion& fusion) {
  Attention a = naive(silu_where(fusion.silu_q, q), silu_where(fusion.silu_k, k),
                      silu_where(fusion.silu_v, v), decay, cu_seqlens, state);
  if (fusion.row_squares) a.row_squares_BTH = row_squares(a.o_BTHV);
  return a;
}

OpResult run_tensors(TensorForm form, OpCall call, const Decay& decay, const Fusion& fusion) {
  call.inputs.erase("slope");  // fixed: no gradient
  return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
    const auto S = state.find("S");
    const Attention a = form(inputs.at("q"), inputs.at("k"), inputs.at("v"), decay, call.cu_seqlens,
                             S == state.end() ? std::nullopt : std::optional(S->second), fusion);
    OpResult result;
    result.out["o"] = a.o_BTHV;
    if (fusion.row_squares) result.out["row_squares"] = a.row_squares_BTH;
    result.state["S"] = a.state_NHKV;
    return result;
  });
}

}  // namespace

Result<OpResult> run_form(std::string_view form, const OpCall& call) {
  EVERLONG_ASSIGN(const Arguments a, arguments_of(call));
  if (form == "reference") return run_reference(ReferenceForm::kParallel, call, a);
  if (form == "reference_chunked") return run_reference(ReferenceForm::kChunked, call, a);
  if (form == "reference_recurrent") return run_reference(ReferenceForm::kRecurrent, call, a);
  if (form == "naive") return run_tensors(by_definition, call, *a.decay, a.fusion);
  if (form == "composite") return run_tensors(by_path<Path::kComposite>, call, *a.decay, a.fusion);
  if (form == "cpu") {
    EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(a.q, a.k, a.v));
    return run_tensors(by_path<Path::kCpu>, call, *a.decay, a.fusion);
  }
  if (form == "auto") return run_tensors(by_path<Path::kAuto>, call, *a.decay, a.fusion);
  return invalid_argument(
      "lightning: \"", form,
      "\" is not a form of decay_linear_attention; known: reference, reference_chunked, "
      "reference_recurrent, naive, composite, cpu, auto");
}

}  // namespace everlong::lightning
