// Kind "cema".
#include "mechanisms/megalodon/op_operator.h"
#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kReferenceBlock = 16;  // small, so that short cases have several blocks
constexpr std::int64_t kSampleModes = 4;

const CallNames& ema_names() {
  static const CallNames kNames = {
      .tokens = {"x"},
      .weights = {"w.alpha", "w.delta", "w.theta", "w.gamma", "w.omega"},
      .optional_weights = {},
      .token_outputs = {"y"},
      .state = {"h"}};
  return kNames;
}

struct EmaCall {
  std::int64_t width = 1, modes = 1;
};

Result<EmaCall> read_ema(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call, ema_names(), 3));
  const at::Tensor& x = call.inputs.at("x");
  EVERLONG_RETURN_IF_ERROR(check_ema_weights(call, x.size(2)));
  const EmaCall out{x.size(2), call.inputs.at("w.alpha").size(1)};
  Settings s(call.params, "megalodon: cema: params");
  const std::int64_t width = s.integer("embed_dim", out.width, 1, std::int64_t{1} << 40);
  const std::int64_t modes = s.integer("ndim", out.modes, 1, std::int64_t{1} << 40);
  s.raw("pieces");
  EVERLONG_RETURN_IF_ERROR(s.finish());
  if (width != out.width || modes != out.modes)
    return invalid_argument("megalodon: embed_dim = ", width, " and ndim = ", modes,
                            " but the tensors have ", out.width, " and ", out.modes);
  if (call.state.empty()) return out;
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  EVERLONG_RETURN_IF_ERROR(
      check_state(call, "h", {sequences_of(call, "x"), out.width, out.modes, 2}, dtype));
  return out;
}

Result<OpResult> run_reference(const OpCall& call, const EmaCall& p, std::string_view form) {
  const at::Tensor& x = call.inputs.at("x");
  const std::int64_t N = sequences_of(call, "x"), D = p.width, M = p.modes;
  std::map<std::string, std::vector<double>> w;
  for (const auto& name : ema_names().weights) w[name] = to_doubles(call.inputs.at(name));
  const auto tensor = [](const TensorMap& map, const std::string& name) {
    const auto found = map.find(name);
    return found == map.end() ? at::Tensor() : found->second;
  };
  const bool wanted = !call.grad_out.empty();
  OpResult out;
  out.out["y"] = at::zeros_like(x, at::MemoryFormat::Contiguous);
  out.state["h"] = at::zeros({N, D, M, 2}, at::kDouble);
  if (wanted) {
    for (const auto& [name, input] : call.inputs)
      out.grad[name] = at::zeros_like(input, at::MemoryFormat::Contiguous);
    if (!call.state.empty()) out.grad["state.h"] = at::zeros({N, D, M, 2}, at::kDouble);
  }
  for (std::int64_t n = 0; n < N; ++n) {
    const auto row = [&](const at::Tensor& t) {
      return t.defined() ? to_doubles(t.select(0, n)) : std::vector<double>();
    };
    const auto values = sequence_doubles(x, call, n), start = row(tensor(call.state, "h"));
    const auto length = static_cast<std::int64_t>(values.size()) / D;
    const reference::Ema ema{
        length,       D,    M, values, w["w.alpha"], w["w.delta"], w["w.theta"], w["w.gamma"],
        w["w.omega"], start};
    const auto result = form == "reference_chunked" ? reference::ema_chunked(ema, kReferenceBlock)
                                                    : reference::ema(ema);
    sequence_view(out.out["y"], call, n).copy_(from_doubles(result.y, {length, D}));
    const auto& h = result.h;
    out.state["h"].select(0, n).copy_(from_doubles(h, {D, M, 2}));
    if (!wanted) continue;
    const auto d =
        reference::ema_gradients(ema, sequence_doubles(tensor(call.grad_out, "y"), call, n),
                                 row(tensor(call.grad_out, "state.h")));
    sequence_view(out.grad["x"], call, n).copy_(from_doubles(d.x, {length, D}));
    const std::pair<const char*, const std::vector<double>*> parts[] = {{"w.alpha", &d.alpha},
                                                                        {"w.delta", &d.delta},
                                                                        {"w.theta", &d.theta},
                                                                        {"w.gamma", &d.gamma},
                                                                        {"w.omega", &d.omega}};
    for (const auto& [name, grad] : parts)
      out.grad[name] += from_doubles(*grad, out.grad[name].sizes());
    if (!call.state.empty()) out.grad["state.h"].select(0, n).copy_(from_doubles(d.h, {D, M, 2}));
  }
  return out;
}

class Cema final : public Operator {
 public:
  std::string_view kind() const override { return "cema"; }

  // The convolution by FFT is no form: rounding in it reaches back in time, so that law 10 cannot
  // hold to the bit.
  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_chunked"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const EmaCall p, read_ema(call));
    const bool known = std::ranges::any_of(forms(), [&](auto& f) { return f.name == form; });
    if (!known) return unknown_form(form, forms());
    if (form.starts_with("reference"))
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("x"), "megalodon", form));
    if (form == "cpu") EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(call.inputs.at("x")));
    return run_documents(call, ema_names(), [&](const OpCall& line) -> Result<OpResult> {
      if (form.starts_with("reference")) return run_reference(line, p, form);
      return run_by_autograd(line, [&](const TensorMap& inputs, const TensorMap& state) {
        return run_tensors(form, line, inputs, state);
      });
    });
  }

  OpCall sample(const OpShape& shape) const override {
    OpCall call;
    const std::int64_t width = shape.heads * shape.key_dim;
    const std::int64_t modes = shape.params.value("ndim", kSampleModes);
    Draw draw(shape.seed);
    call.inputs["x"] = draw({shape.batch, shape.tokens, width});
    draw_ema_weights(draw, call, width, modes);
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (shape.initial_state)
      call.state["h"] = draw({everlong::sequences_of(shape), width, modes, 2});
    return call;
  }

  std::vector<std::string> token_inputs() const override { return {"x"}; }

  std::vector<OpShape> law_shapes() const override {
    return {{.heads = 1, .key_dim = 5, .params = {{"ndim", 16}}},
            {.heads = 1, .key_dim = 20, .params = {{"ndim", 1}}},
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
    add("modes_differ", plain,
        [](OpCall& c) { c.inputs["w.delta"] = c.inputs["w.delta"].narrow(1, 0, 2); });
    add("other_ndim", plain, [](OpCall& c) { c.params["ndim"] = 9; });
    add("other_width", plain, [](OpCall& c) { c.inputs["x"] = c.inputs["x"].narrow(2, 0, 3); });
    add("no_modes", plain, [](OpCall& c) {
      for (const char* name : {"w.alpha", "w.delta", "w.gamma"})
        c.inputs[name] = c.inputs[name].narrow(1, 0, 0);
    });
    add("weight_missing", plain, [](OpCall& c) { c.inputs.erase("w.omega"); });
    add("input_unknown", plain, [](OpCall& c) { c.inputs["w.beta"] = c.inputs["w.omega"]; });
    add("param_unknown", plain, [](OpCall& c) { c.params["dim"] = 2; });
    add("mixed_dtypes", plain,
        [](OpCall& c) { c.inputs["w.alpha"] = c.inputs["w.alpha"].to(at::kFloat); });
    add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
    add("reset_with_offsets", packed, [](OpCall& c) {
      c.inputs["reset"] = at::zeros({1, 6}, at::kByte);
    });
    add("state_of_another_batch", carried, [](OpCall& c) {
      c.state["h"] = at::cat({c.state["h"], c.state["h"]}, 0);
    });
    add("state_without_imaginary_part", carried,
        [](OpCall& c) { c.state["h"] = c.state["h"].narrow(3, 0, 1); });
    add("state_unknown", carried, [](OpCall& c) { c.state["S"] = c.state["h"]; });
    return list;
  }

  // 12 operations a mode and element forward (the state 6, the output 4, the input 2), 30 more
  // backward.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const double tokens = pass == "step" ? 1 : static_cast<double>(shape.tokens);
    const double elements = static_cast<double>(shape.batch * shape.heads * shape.key_dim) * tokens;
    const auto modes = static_cast<double>(shape.params.value("ndim", kSampleModes));
    const bool train = pass == "train";
    return {.flops = elements * modes * (train ? 42 : 12),
            .bytes = elements * static_cast<double>(element_bytes) * (train ? 5 : 2)};
  }

 private:
  OpResult run_tensors(std::string_view form, const OpCall& call, const TensorMap& inputs,
                       const TensorMap& state) const {
    const at::Tensor& x = inputs.at("x");
    const at::Tensor h = state.empty() ? at::Tensor() : state.at("h");
    const EmaWeights weights = ema_weights(inputs);
    Averaged out;
    if (form != "naive") {
      out = cema(x, weights, call.cu_seqlens, h, form == "cpu" ? Path::kCpu : Path::kComposite);
    } else if (call.cu_seqlens.empty()) {
      out = naive_cema(x, weights, h);
    } else {
      std::vector<at::Tensor> ys, hs;
      for (std::int64_t n = 0; n < sequences_of(call, "x"); ++n) {
        const Averaged one = naive_cema(sequence_view(x, call, n).unsqueeze(0), weights,
                                        h.defined() ? h.narrow(0, n, 1) : h);
        ys.push_back(one.y_BTD);
        hs.push_back(one.h_NDM2);
      }
      out = {at::cat(ys, 1), at::cat(hs, 0)};
    }
    OpResult result;
    result.out["y"] = out.y_BTD;
    result.state["h"] = out.h_NDM2;
    return result;
  }
};

}  // namespace

const Operator& cema_operator() {
  static const Cema kOperator;
  return kOperator;
}

}  // namespace everlong::megalodon
