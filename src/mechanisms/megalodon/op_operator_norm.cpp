// Kind "timestep_norm".
#include "mechanisms/megalodon/op_operator.h"
#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kMostPrior = std::int64_t{1} << 40;

const CallNames& norm_names() {
  static const CallNames kNames = {.tokens = {"x"},
                                   .weights = {"w.weight", "w.bias"},
                                   .optional_weights = {"w.prior_mean", "w.prior_logv"},
                                   .token_outputs = {"y"},
                                   .state = {"count", "mean", "var"}};
  return kNames;
}

struct NormCall {
  std::int64_t width = 1, groups = 1, prior = 0;
  double eps = kNormEps;
};

Result<NormCall> read_norm(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call, norm_names(), 3));
  const at::Tensor& x = call.inputs.at("x");
  NormCall out;
  out.width = x.size(2);
  Settings s(call.params, "megalodon: timestep_norm: params");
  const std::int64_t width = s.integer("num_features", out.width, 1, std::int64_t{1} << 40);
  out.groups = s.integer("num_groups", 1, 1, std::int64_t{1} << 40);
  out.prior = s.integer("prior_count", 0, 0, kMostPrior);
  out.eps = s.number("eps", kNormEps, 0, 1);
  s.raw("pieces");
  EVERLONG_RETURN_IF_ERROR(s.finish());
  if (width != out.width)
    return invalid_argument("megalodon: num_features = ", width, " but x has ", out.width,
                            " channels");
  EVERLONG_RETURN_IF_ERROR(check_norm(out.width, out.groups, out.eps));
  for (const char* name : {"w.weight", "w.bias"})
    EVERLONG_RETURN_IF_ERROR(check_shape(name, call.inputs.at(name), {out.width}));
  for (const char* name : {"w.prior_mean", "w.prior_logv"}) {
    if ((out.prior > 0) != call.inputs.contains(name))
      return invalid_argument("megalodon: prior_count = ", out.prior, " and ", name,
                              out.prior > 0 ? " is missing" : " is given",
                              "; a prior has both, and no prior neither");
    if (out.prior > 0)
      EVERLONG_RETURN_IF_ERROR(check_shape(name, call.inputs.at(name), {out.groups}));
  }
  if (out.prior > 0 && call.inputs.contains("reset"))
    return unsupported(
        "megalodon: reset with prior_count > 0; give each document as a sequence of "
        "a packed line");
  if (call.state.empty()) return out;
  const std::int64_t N = sequences_of(call, "x");
  EVERLONG_RETURN_IF_ERROR(check_state(call, "mean", {N, out.groups}, at::kDouble));
  EVERLONG_RETURN_IF_ERROR(check_state(call, "var", {N, out.groups}, at::kDouble));
  EVERLONG_RETURN_IF_ERROR(read_counts(call.state.at("count"), N).status());
  return out;
}

NormState state_of(const TensorMap& state, const NormCall& p, std::int64_t sequences,
                   at::Device device) {
  if (state.empty()) return fresh_norm_state(sequences, p.groups, device);
  return {*read_counts(state.at("count"), sequences), state.at("mean"), state.at("var")};
}

Result<OpResult> run_reference(const OpCall& call, const NormCall& p, bool pooled) {
  const at::Tensor& x = call.inputs.at("x");
  const std::int64_t N = sequences_of(call, "x");
  const NormState state = state_of(call.state, p, N, x.device());
  const auto weight = to_doubles(call.inputs.at("w.weight")),
             bias = to_doubles(call.inputs.at("w.bias"));
  OpResult out;
  const auto grad = [&](const std::string& name) {
    const auto found = call.grad_out.find(name);
    return found == call.grad_out.end() ? at::Tensor() : found->second;
  };
  const bool wanted = !call.grad_out.empty();
  out.out["y"] = at::zeros_like(x, at::MemoryFormat::Contiguous);
  out.state = {{"mean", state.mean_NG.clone()}, {"var", state.var_NG.clone()}};
  if (wanted) {
    for (const char* name : {"x", "w.weight", "w.bias"})
      out.grad[name] = at::zeros_like(call.inputs.at(name), at::MemoryFormat::Contiguous);
    if (!call.state.empty())
      for (const char* name : {"mean", "var"})
        out.grad[cat("state.", name)] = at::zeros({N, p.groups}, at::kDouble);
  }
  std::vector<std::int64_t> counts;
  for (std::int64_t n = 0; n < N; ++n) {
    const auto row = [&](const at::Tensor& t) {
      return t.defined() ? to_doubles(t.select(0, n)) : std::vector<double>();
    };
    const auto values = sequence_doubles(x, call, n);
    const auto mean = row(state.mean_NG), var = row(state.var_NG);
    const auto length = static_cast<std::int64_t>(values.size()) / p.width;
    const reference::Norm norm{length, p.width, p.groups, p.eps,
                               values, weight,  bias,     state.counts[static_cast<std::size_t>(n)],
                               mean,   var};
    const auto result =
        pooled ? reference::timestep_norm_pooled(norm) : reference::timestep_norm(norm);
    sequence_view(out.out["y"], call, n).copy_(from_doubles(result.y, {length, p.width}));
    out.state["mean"].select(0, n).copy_(from_doubles(result.mean, {p.groups}));
    out.state["var"].select(0, n).copy_(from_doubles(result.var, {p.groups}));
    counts.push_back(result.count);
    if (!wanted) continue;
    const auto gy = sequence_doubles(grad("y"), call, n);
    const auto d = reference::timestep_norm_gradients(norm, gy, row(grad("state.mean")),
                                                      row(grad("state.var")));
    sequence_view(out.grad["x"], call, n).copy_(from_doubles(d.x, {length, p.width}));
    out.grad["w.weight"] += from_doubles(d.weight, {p.width});
    out.grad["w.bias"] += from_doubles(d.bias, {p.width});
    if (call.state.empty()) continue;
    out.grad["state.mean"].select(0, n).copy_(from_doubles(d.mean, {p.groups}));
    out.grad["state.var"].select(0, n).copy_(from_doubles(d.var, {p.groups}));
  }
  out.state["count"] = counts_tensor(counts, x.device());
  return out;
}

class TimestepNorm final : public Operator {
 public:
  std::string_view kind() const override { return "timestep_norm"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_pooled"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& given) const override {
    EVERLONG_ASSIGN(const NormCall p, read_norm(given));
    const bool known = std::ranges::any_of(forms(), [&](auto& f) { return f.name == form; });
    if (!known) return unknown_form(form, forms());
    if (form.starts_with("reference"))
      EVERLONG_RETURN_IF_ERROR(require_reference_input(given.inputs.at("x"), "megalodon", form));
    if (form == "cpu") EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(given.inputs.at("x")));
    OpCall call = given;
    const bool from_prior = p.prior > 0 && call.state.empty();
    if (from_prior) {  // the state before the first token
      const std::int64_t N = sequences_of(call, "x");
      const auto rows = [&](const at::Tensor& x) {
        return x.to(at::kDouble).expand({N, p.groups}).contiguous();
      };
      call.state["count"] = at::full({N}, p.prior, at::kLong);
      call.state["mean"] = rows(call.inputs.at("w.prior_mean"));
      call.state["var"] = rows(call.inputs.at("w.prior_logv").to(at::kDouble).exp());
    }
    call.inputs.erase("w.prior_mean");
    call.inputs.erase("w.prior_logv");
    EVERLONG_ASSIGN(OpResult result, run_documents(call, norm_names(), [&](const OpCall& line) {
                      return run_form(form, line, p);
                    }));
    if (from_prior && result.grad.contains("state.mean")) {
      const auto dtype = given.inputs.at("x").scalar_type();
      result.grad["w.prior_mean"] = result.grad.at("state.mean").sum(0).to(dtype);
      result.grad["w.prior_logv"] =
          (result.grad.at("state.var") * call.state.at("var")).sum(0).to(dtype);
      result.grad.erase("state.mean");
      result.grad.erase("state.var");
    }
    return result;
  }

  OpCall sample(const OpShape& shape) const override {
    OpCall call;
    const std::int64_t width = shape.heads * shape.key_dim;
    Draw draw(shape.seed);
    call.inputs["x"] = draw({shape.batch, shape.tokens, width}, 1, 0.5);
    call.inputs["w.weight"] = draw({width}, 0.3);
    call.inputs["w.bias"] = draw({width});
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (!call.params.contains("num_groups")) call.params["num_groups"] = shape.heads;
    if (shape.initial_state)
      draw_norm_state(draw, call, everlong::sequences_of(shape),
                      call.params.at("num_groups").get<std::int64_t>());
    return call;
  }

  at::ScalarType state_dtype(at::ScalarType) const override { return at::kDouble; }
  std::vector<std::string> token_inputs() const override { return {"x"}; }

  std::vector<OpShape> law_shapes() const override {
    return {{.heads = 1, .key_dim = 6, .params = {{"num_groups", 1}}},
            {.heads = 3, .key_dim = 2, .params = {{"num_groups", 3}, {"eps", 0.1}}},
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
    add("no_groups", plain, [](OpCall& c) { c.params["num_groups"] = 0; });
    add("other_width", plain, [](OpCall& c) { c.params["num_features"] = 7; });
    add("param_unknown", plain, [](OpCall& c) { c.params["num_group"] = 2; });
    add("eps_negative", plain, [](OpCall& c) { c.params["eps"] = -1; });
    add("weight_short", plain,
        [](OpCall& c) { c.inputs["w.weight"] = c.inputs["w.weight"].narrow(0, 0, 3); });
    add("mixed_dtypes", plain,
        [](OpCall& c) { c.inputs["w.bias"] = c.inputs["w.bias"].to(at::kFloat); });
    add("integers", plain, [](OpCall& c) {
      for (auto& [name, x] : c.inputs) x = x.to(at::kLong);
    });
    add("two_dimensions", plain, [](OpCall& c) { c.inputs["x"] = c.inputs["x"].select(0, 0); });
    add("prior_missing", plain, [](OpCall& c) { c.params["prior_count"] = 2; });
    add("mask_of_floats", plain, [](OpCall& c) {
      c.inputs["padding_mask"] = at::zeros({1, 6}, at::kDouble);
    });
    add("mask_of_other_tokens", plain, [](OpCall& c) {
      c.inputs["padding_mask"] = at::zeros({1, 5}, at::kByte);
    });
    add("mask_with_offsets", packed, [](OpCall& c) {
      c.inputs["padding_mask"] = at::zeros({1, 6}, at::kByte);
    });
    add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
    add("offsets_past_the_end", packed, [](OpCall& c) { c.cu_seqlens = {0, 2, 7}; });
    add("state_incomplete", carried, [](OpCall& c) { c.state.erase("var"); });
    add("state_in_fp32", carried,
        [](OpCall& c) { c.state["mean"] = c.state["mean"].to(at::kFloat); });
    add("state_of_other_groups", carried,
        [](OpCall& c) { c.state["var"] = c.state["var"].narrow(1, 0, 1); });
    add("count_negative", carried, [](OpCall& c) { c.state["count"] = c.state["count"] - 99; });
    return list;
  }

  // Moments, statistics and scaling: about 8 operations an element forward, as many again and more
  // backward.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const double tokens = pass == "step" ? 1 : static_cast<double>(shape.tokens);
    const double elements = static_cast<double>(shape.batch * shape.heads * shape.key_dim) * tokens;
    const bool train = pass == "train";
    return {.flops = elements * (train ? 24 : 8),
            .bytes = elements * static_cast<double>(element_bytes) * (train ? 5 : 2)};
  }

 private:
  Result<OpResult> run_form(std::string_view form, const OpCall& call, const NormCall& p) const {
    if (form.starts_with("reference")) return run_reference(call, p, form == "reference_pooled");
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
      const at::Tensor &x = inputs.at("x"), &weight = inputs.at("w.weight"),
                       &bias = inputs.at("w.bias");
      const std::int64_t N = sequences_of(call, "x");
      const NormState before = state_of(state, p, N, x.device());
      Normalised out;
      if (form == "naive" && call.cu_seqlens.empty()) {
        out = naive_timestep_norm(x, weight, bias, p.eps, before);
      } else if (form == "naive") {
        std::vector<at::Tensor> ys;
        std::vector<NormState> states;
        for (std::int64_t n = 0; n < N; ++n) {
          Normalised one = naive_timestep_norm(sequence_view(x, call, n).unsqueeze(0), weight, bias,
                                               p.eps, rows_of(before, n, 1));
          ys.push_back(one.y_BTD);
          states.push_back(std::move(one.state));
        }
        out = {at::cat(ys, 1), joined(states)};
      } else {
        out = timestep_norm(x, weight, bias, p.eps, call.cu_seqlens, before,
                            form == "cpu" ? Path::kCpu : Path::kComposite);
      }
      OpResult result;
      result.out["y"] = out.y_BTD;
      result.state = {{"count", counts_tensor(out.state.counts, x.device())},
                      {"mean", out.state.mean_NG},
                      {"var", out.state.var_NG}};
      return result;
    });
  }
};

}  // namespace

const Operator& timestep_norm_operator() {
  static const TimestepNorm kOperator;
  return kOperator;
}

}  // namespace everlong::megalodon
