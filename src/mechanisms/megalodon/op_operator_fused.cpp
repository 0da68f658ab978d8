// Kind "norm_cema": u = timestep_norm(x), e = cema(u), as the CPU kernel fuses them.
#include "mechanisms/megalodon/op_operator.h"

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kFusedSampleModes = 4;

const CallNames& fused_names() {
  static const CallNames kNames = {
      .tokens = {"x"},
      .weights = {"w.weight", "w.bias", "w.alpha", "w.delta", "w.theta", "w.gamma", "w.omega"},
      .optional_weights = {},
      .token_outputs = {"u", "e"},
      .state = {"count", "mean", "var", "h"}};
  return kNames;
}

struct FusedCall {
  std::int64_t width = 1, modes = 1, groups = 1;
  double eps = kNormEps;
};

Result<FusedCall> read_fused(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call, fused_names(), 3));
  const at::Tensor& x = call.inputs.at("x");
  FusedCall out;
  out.width = x.size(2);
  Settings s(call.params, "megalodon: norm_cema: params");
  out.groups = s.integer("num_groups", 1, 1, std::int64_t{1} << 40);
  out.eps = s.number("eps", kNormEps, 0, 1);
  out.modes = s.integer(
      "ndim", call.inputs.at("w.alpha").dim() == 3 ? call.inputs.at("w.alpha").size(1) : 1, 0,
      std::int64_t{1} << 40);
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(check_norm(out.width, out.groups, out.eps));
  for (const char* name : {"w.weight", "w.bias"})
    EVERLONG_RETURN_IF_ERROR(check_shape(name, call.inputs.at(name), {out.width}));
  EVERLONG_RETURN_IF_ERROR(check_ema_weights(call, out.width));
  if (out.modes != call.inputs.at("w.alpha").size(1))
    return invalid_argument("megalodon: ndim = ", out.modes, " but the weights have ",
                            call.inputs.at("w.alpha").size(1), " modes");
  if (call.state.empty()) return out;
  const std::int64_t N = sequences_of(call, "x");
  for (const char* name : {"mean", "var"})
    EVERLONG_RETURN_IF_ERROR(check_state(call, name, {N, out.groups}, at::kDouble));
  EVERLONG_RETURN_IF_ERROR(check_state(call, "h", {N, out.width, out.modes, 2}, at::kDouble));
  EVERLONG_RETURN_IF_ERROR(read_counts(call.state.at("count"), N).status());
  return out;
}

// One operator after the other, and their gradients in reverse.
Result<OpResult> run_composed(std::string_view form, const OpCall& call, const FusedCall& p) {
  const auto dtype = call.inputs.at("x").scalar_type();
  OpCall norm, average;
  norm.cu_seqlens = average.cu_seqlens = call.cu_seqlens;
  for (const char* name : {"x", "w.weight", "w.bias"}) norm.inputs[name] = call.inputs.at(name);
  norm.params = {{"num_groups", p.groups}, {"eps", p.eps}};
  for (const char* name : {"w.alpha", "w.delta", "w.theta", "w.gamma", "w.omega"})
    average.inputs[name] = call.inputs.at(name);
  if (!call.state.empty()) {
    for (const char* name : {"count", "mean", "var"}) norm.state[name] = call.state.at(name);
    average.state["h"] = call.state.at("h").to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  }
  EVERLONG_ASSIGN(OpResult u, timestep_norm_operator().run(form, norm));
  average.inputs["x"] = u.out.at("y");
  const auto pass_on = [&](OpCall& to, const char* name, const char* as) {
    const auto found = call.grad_out.find(name);
    if (found != call.grad_out.end()) to.grad_out[as] = found->second;
  };
  pass_on(average, "e", "y");
  if (const auto h = call.grad_out.find("state.h"); h != call.grad_out.end())
    average.grad_out["state.h"] = h->second.to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  EVERLONG_ASSIGN(OpResult e, cema_operator().run(form, average));
  OpResult out;
  out.out = {{"u", u.out.at("y")}, {"e", e.out.at("y")}};
  if (!call.grad_out.empty()) {
    pass_on(norm, "u", "y");
    pass_on(norm, "state.mean", "state.mean");
    pass_on(norm, "state.var", "state.var");
    if (e.grad.contains("x"))
      norm.grad_out["y"] =
          norm.grad_out.contains("y") ? norm.grad_out["y"] + e.grad.at("x") : e.grad.at("x");
    EVERLONG_ASSIGN(u, timestep_norm_operator().run(form, norm));
    out.grad = u.grad;
    for (const auto& [name, grad] : e.grad)
      if (name != "x") out.grad[name] = name == "state.h" ? grad.to(at::kDouble) : grad;
  }
  out.state = u.state;
  out.state["h"] = e.state.at("h").to(at::kDouble);
  return out;
}

class NormCema final : public Operator {
 public:
  std::string_view kind() const override { return "norm_cema"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const FusedCall p, read_fused(call));
    const bool known = std::ranges::any_of(forms(), [&](auto& f) { return f.name == form; });
    if (!known) return unknown_form(form, forms());
    if (form == "reference")
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("x"), "megalodon", form));
    if (form == "cpu") EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(call.inputs.at("x")));
    return run_documents(call, fused_names(), [&](const OpCall& line) -> Result<OpResult> {
      if (form != "cpu") return run_composed(form, line, p);
      return run_by_autograd(line, [&](const TensorMap& inputs, const TensorMap& state) {
        return run_kernel(line, p, inputs, state);
      });
    });
  }

  OpCall sample(const OpShape& shape) const override {
    OpCall call;
    const std::int64_t width = shape.heads * shape.key_dim, N = everlong::sequences_of(shape);
    const std::int64_t modes = shape.params.value("ndim", kFusedSampleModes);
    Draw draw(shape.seed);
    call.inputs["x"] = draw({shape.batch, shape.tokens, width}, 1, 0.5);
    call.inputs["w.weight"] = draw({width}, 0.3);
    call.inputs["w.bias"] = draw({width});
    draw_ema_weights(draw, call, width, modes);
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (!call.params.contains("num_groups")) call.params["num_groups"] = shape.heads;
    if (!shape.initial_state) return call;
    draw_norm_state(draw, call, N, call.params.at("num_groups").get<std::int64_t>());
    call.state["h"] = draw({N, width, modes, 2});
    return call;
  }

  // One dtype for all states: fp64, as the statistics are. The kernel carries h in fp32.
  at::ScalarType state_dtype(at::ScalarType) const override { return at::kDouble; }
  std::vector<std::string> token_inputs() const override { return {"x"}; }

  std::vector<OpShape> law_shapes() const override {
    return {{.heads = 3, .key_dim = 16, .params = {{"ndim", 16}}},
            {.heads = 1, .key_dim = 10, .params = {{"ndim", 1}, {"num_groups", 2}}},
            {.tokens = 90, .cu_seqlens = {0, 31, 31, 32, 90}, .initial_state = true}};
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    std::vector<std::pair<std::string, OpCall>> list;
    const auto add = [&](const char* name, const OpShape& shape, auto&& change) {
      OpCall call = sample(shape);
      change(call);
      list.emplace_back(name, std::move(call));
    };
    const OpShape plain{.tokens = 6}, packed{.tokens = 6, .cu_seqlens = {0, 2, 6}},
        carried{.tokens = 6, .initial_state = true};
    add("groups_do_not_divide", plain, [](OpCall& c) { c.params["num_groups"] = 5; });
    add("other_ndim", plain, [](OpCall& c) { c.params["ndim"] = 9; });
    add("param_unknown", plain, [](OpCall& c) { c.params["embed_dim"] = 2; });
    add("weight_missing", plain, [](OpCall& c) { c.inputs.erase("w.bias"); });
    add("other_width", plain, [](OpCall& c) { c.inputs["x"] = c.inputs["x"].narrow(2, 0, 30); });
    add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
    add("state_incomplete", carried, [](OpCall& c) { c.state.erase("h"); });
    add("state_of_another_batch", carried, [](OpCall& c) {
      c.state["h"] = at::cat({c.state["h"], c.state["h"]}, 0);
    });
    return list;
  }

  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const double tokens = pass == "step" ? 1 : static_cast<double>(shape.tokens);
    const double elements = static_cast<double>(shape.batch * shape.heads * shape.key_dim) * tokens;
    const auto modes = static_cast<double>(shape.params.value("ndim", kFusedSampleModes));
    const bool train = pass == "train";
    return {.flops = elements * (train ? 24 + 42 * modes : 8 + 12 * modes),
            .bytes = elements * static_cast<double>(element_bytes) * (train ? 8 : 3)};
  }

 private:
  OpResult run_kernel(const OpCall& call, const FusedCall& p, const TensorMap& inputs,
                      const TensorMap& state) const {
    const at::Tensor& x = inputs.at("x");
    const std::int64_t N = sequences_of(call, "x");
    NormState before = fresh_norm_state(N, p.groups, x.device());
    at::Tensor h;
    if (!state.empty()) {
      before = {*read_counts(state.at("count"), N), state.at("mean"), state.at("var")};
      h = state.at("h").to(at::kFloat);
    }
    NormAveraged out = norm_cema(x, inputs.at("w.weight"), inputs.at("w.bias"), p.eps,
                                 ema_weights(inputs), call.cu_seqlens, before, h, Path::kCpu);
    OpResult result;
    result.out = {{"u", out.u_BTD}, {"e", out.e_BTD}};
    result.state = {{"count", counts_tensor(out.norm.counts, x.device())},
                    {"mean", out.norm.mean_NG},
                    {"var", out.norm.var_NG},
                    {"h", out.h_NDM2.to(at::kDouble)}};
    return result;
  }
};

}  // namespace

const Operator& norm_cema_operator() {
  static const NormCema kOperator;
  return kOperator;
}

}  // namespace everlong::megalodon
