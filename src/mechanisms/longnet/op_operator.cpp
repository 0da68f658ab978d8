#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "mechanisms/longnet/op_call.h"
#include "mechanisms/longnet/op_cpu.h"
#include "mechanisms/longnet/params_lattice.h"
#include "ops/attention_refusals.h"
#include "ops/reference_call.h"

namespace everlong::longnet {
namespace {

using nlohmann::json;

std::vector<double> by_merge(const reference::Problem& problem) {
  return reference::merged(problem).out;
}

at::Tensor by_composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const Options& options, const Past& past) {
  Options chosen = options;
  chosen.path = Path::kComposite;
  return attention(q, k, v, chosen, past);
}

at::Tensor by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const Options& options, const Past& past) {
  Options chosen = options;
  chosen.path = Path::kCpu;
  return attention(q, k, v, chosen, past);
}

struct Forms {
  Reference reference = nullptr;
  Attend attend = nullptr;
};

// The form of that name, or a refusal.
Result<Forms> find_form(std::string_view form, const OpCall& call, const Params& params) {
  const at::Tensor& q = call.inputs.at("q");
  if (form.starts_with("reference")) {
    EVERLONG_RETURN_IF_ERROR(require_reference_input(q, "longnet", form));
    if (form == "reference") return Forms{reference::closed_form, nullptr};
    if (form == "reference_merged") return Forms{by_merge, nullptr};
    // Bidirectional attention has no recurrent form.
    if (form == "reference_recurrent")
      return Forms{params.geometry.causal ? reference::recurrent : by_merge, nullptr};
  }
  if (form == "naive") return Forms{nullptr, naive};
  if (form == "composite") return Forms{nullptr, by_composite};
  if (form == "cpu") {
    EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(q, call.inputs.at("k"), call.inputs.at("v"), {}));
    return Forms{nullptr, by_cpu_kernel};
  }
  return invalid_argument("longnet: \"", form,
                          "\" is not a form; known: composite, cpu, naive, reference, "
                          "reference_merged, reference_recurrent");
}

Result<OpResult> run_form(const Forms& forms, const OpCall& call, const Params& params) {
  if (forms.reference != nullptr) return run_reference(forms.reference, call, params);
  return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
    return run_sequences(forms.attend, inputs, state, params);
  });
}

json example_params(std::int64_t tokens) {
  if (tokens <= 2048) return {{"segment_length", {16, 32, 64}}, {"dilated_ratio", {1, 2, 4}}};
  json segments = json::array(), ratios = json::array();
  for (std::int64_t w = 2048, r = 1; segments.empty() || w <= tokens; w *= 2, r *= 2) {
    segments.push_back(w);
    ratios.push_back(r);
  }
  return {{"segment_length", segments}, {"dilated_ratio", ratios}};
}

class DilatedAttention final : public Operator {
 public:
  std::string_view kind() const override { return "dilated_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_merged"},
            {.name = "reference_recurrent"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const Params params, read_call(call));
    EVERLONG_ASSIGN(const Forms forms, find_form(form, call, params));
    return run_form(forms, call, params);
  }

  OpCall sample(const OpShape& shape) const override {
    const auto generator = at::detail::createCPUGenerator(shape.seed);
    const auto draw = [&](std::vector<std::int64_t> sizes) {
      return at::randn(sizes, generator, at::kDouble);
    };
    OpCall call;
    const std::int64_t B = shape.batch, T = shape.tokens, G = shape.kv_heads;
    call.inputs["q"] = draw({B, T, shape.heads, shape.key_dim});
    call.inputs["k"] = draw({B, T, G, shape.key_dim});
    call.inputs["v"] = draw({B, T, G, shape.value_dim});
    call.cu_seqlens = shape.cu_seqlens;
    call.params = example_params(T);
    call.params.update(shape.params);
    if (!shape.initial_state) return call;
    const auto params = read_call(call);
    if (!params.ok() || !params->geometry.causal) return call;
    // Positions of their own, one of them 0 where there are several.
    const std::int64_t N = sequences_of(shape);
    std::vector<std::int64_t> positions;
    for (std::int64_t n = 0; n < N; ++n) positions.push_back(n == 1 ? 0 : 11 + 7 * n);
    call.state["position"] = at::tensor(positions, at::kLong);
    for (std::size_t i = 0; i < params->geometry.patterns.size(); ++i) {
      const Pattern& pattern = params->geometry.patterns[i];
      at::Tensor held = at::zeros({N, G, 1, 1}, at::kLong);
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t g = 0; g < G; ++g)
          held[n][g].fill_(rows_held(pattern,
                                     offset_of(params->geometry.offset_rule, g, G, pattern.ratio),
                                     positions[static_cast<std::size_t>(n)]));
      const at::Tensor padding = at::arange(pattern.rows()).view({1, 1, -1, 1}) >= held;
      call.state[cat("k", i)] = draw({N, G, pattern.rows(), shape.key_dim}).masked_fill(padding, 0);
      call.state[cat("v", i)] =
          draw({N, G, pattern.rows(), shape.value_dim}).masked_fill(padding, 0);
    }
    return call;
  }

  // Buffers of keys and values are not accumulators: they keep what they were given.
  at::ScalarType state_dtype(at::ScalarType dtype) const override { return dtype; }
  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }

  std::vector<OpShape> law_shapes() const override {
    const auto patterns = [](std::vector<std::int64_t> w, std::vector<std::int64_t> r,
                             const json& more = json::object()) {
      json params = {{"segment_length", w}, {"dilated_ratio", r}};
      params.update(more);
      return params;
    };
    return {
        {.tokens = 70,
         .heads = 4,
         .kv_heads = 2,
         .key_dim = 8,
         .value_dim = 24,
         .params = patterns({8, 20, 100}, {1, 3, 7}, {{"offset_rule", "block"}, {"scale", 0.5}})},
        {.batch = 2,
         .tokens = 65,
         .heads = 6,
         .kv_heads = 6,
         .params = patterns({16, 32, 64}, {1, 2, 4}, {{"beyond", "grow"}})},
        {.tokens = 65,
         .heads = 2,
         .params = patterns({16, 32}, {2, 4})},  // no ratio of 1: uncovered rows
        {.tokens = 90,
         .heads = 4,
         .kv_heads = 2,
         .cu_seqlens = {0, 31, 31, 32, 90},
         .initial_state = true,
         .params = patterns({4, 12}, {1, 5})},
    };
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    AttentionRefusals list(*this);
    const auto set = [](const char* key, const json& value) {
      return [=](OpCall& c) { c.params[key] = value; };
    };
    list.add("param_unknown", list.plain, set("segment_lengths", {16}));
    list.add("patterns_missing", list.plain, [](OpCall& c) { c.params.erase("segment_length"); });
    list.add("patterns_as_text", list.plain, set("segment_length", "[16, 32, 64]"));
    list.add("patterns_of_two_lengths", list.plain, set("dilated_ratio", {1, 2}));
    list.add("no_patterns", list.plain, [](OpCall& c) {
      c.params["segment_length"] = json::array();
      c.params["dilated_ratio"] = json::array();
    });
    list.add("segment_zero", list.plain, set("segment_length", {16, 0, 64}));
    list.add("ratio_negative", list.plain, set("dilated_ratio", {1, -2, 4}));
    list.add("offset_rule_unknown", list.plain, set("offset_rule", "spread"));
    list.add("scale_zero", list.plain, set("scale", 0));
    list.add("grow_without_order", list.plain, [](OpCall& c) {
      c.params["beyond"] = "grow";
      c.params["segment_length"] = {64, 32, 16};
    });
    list.add("grow_bidirectional", list.plain, [](OpCall& c) {
      c.params["beyond"] = "grow";
      c.params["causal"] = false;
    });
    list.add("state_bidirectional", list.carried, set("causal", false));
    list.add("state_of_another_width", list.carried,
             [](OpCall& c) { c.state["k0"] = c.state["k0"].narrow(3, 0, 8); });
    list.add("state_of_another_dtype", list.carried,
             [](OpCall& c) { c.state["v1"] = c.state["v1"].to(at::kFloat); });
    list.add("state_incomplete", list.carried, [](OpCall& c) { c.state.erase("position"); });
    list.add("state_position_negative", list.carried,
             [](OpCall& c) { c.state["position"] = c.state["position"] * 0 - 1; });
    list.add("state_position_of_floats", list.carried,
             [](OpCall& c) { c.state["position"] = c.state["position"].to(at::kDouble); });
    return std::move(list).take();
  }

  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const auto params = read_call(sample({.tokens = shape.tokens,
                                          .heads = shape.heads,
                                          .kv_heads = shape.kv_heads,
                                          .key_dim = 1,
                                          .value_dim = 1,
                                          .params = shape.params}));
    if (!params.ok()) return {};
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(shape.batch), shape.tokens);
    if (!shape.cu_seqlens.empty()) lengths.clear();
    for (std::size_t n = 1; n < shape.cu_seqlens.size(); ++n)
      lengths.push_back(shape.cu_seqlens[n] - shape.cu_seqlens[n - 1]);
    const bool step = pass == "step";
    double pairs = 0, tokens = 0;
    for (const std::int64_t length : lengths) {
      pairs += step ? visible_pairs(params->geometry, shape.kv_heads, length, 1)
                    : visible_pairs(params->geometry, shape.kv_heads, 0, length);
      tokens += step ? 1 : static_cast<double>(length);
    }
    const auto K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim),
               H = static_cast<double>(shape.heads), G = static_cast<double>(shape.kv_heads);
    const double passes = pass == "train" ? 3 : 1;
    const double keys = step ? pairs : tokens * G;  // pairs are of key/value heads
    return {.flops = passes * 2 * pairs * (H / G) * (K + V),
            .bytes = passes * (tokens * H + keys) * (K + V) * static_cast<double>(element_bytes)};
  }
};

class DilatedDecode final : public Operator {
 public:
  std::string_view kind() const override { return "dilated_decode"; }
  std::vector<OpForm> forms() const override { return attention_operator().forms(); }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    DecodeParams decode;
    EVERLONG_ASSIGN(const Params params, read_call(call, &decode));
    if (!params.geometry.causal)
      return invalid_argument("longnet: dilated_decode is causal; params causal = false was given");
    EVERLONG_RETURN_IF_ERROR(check_rows(params, decode));
    OpCall piece = call;
    piece.grad_out.clear();
    std::vector<at::Tensor> outputs;
    for (std::int64_t t = 0; t < params.tokens;) {
      const std::int64_t count = t < decode.prefill ? decode.prefill : 1;
      for (const auto& [name, x] : call.inputs) piece.inputs[name] = x.narrow(1, t, count);
      Params now = params;
      now.tokens = count;
      now.positions.clear();
      if (!piece.state.empty()) now.positions.assign(static_cast<std::size_t>(params.batch), t);
      EVERLONG_ASSIGN(const Forms forms, find_form(form, piece, now));
      EVERLONG_ASSIGN(OpResult result, run_form(forms, piece, now));
      if (t >= decode.prefill) outputs.push_back(result.out.at("o"));
      piece.state = std::move(result.state);
      t += count;
    }
    OpResult all;
    const at::Tensor& v = call.inputs.at("v");
    all.out["o"] = outputs.empty()
                       ? at::zeros({params.batch, 0, params.heads, params.value_dim}, v.options())
                       : at::cat(outputs, 1);
    return all;
  }

  bool is_sequence() const override { return false; }
  OpCall sample(const OpShape& shape) const override { return attention_operator().sample(shape); }
  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override { return {}; }
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    return attention_operator().cost(shape, pass, element_bytes);
  }

 private:
  static Status check_rows(const Params& p, const DecodeParams& decode) {
    if (decode.state_rows.empty()) return {};
    const auto& told = decode.state_rows;
    if (told.size() != p.geometry.patterns.size())
      return invalid_argument("longnet: state_rows tells of ", told.size(), " patterns; there are ",
                              p.geometry.patterns.size());
    for (std::size_t i = 0; i < told.size(); ++i)
      for (std::int64_t g = 0; g < p.kv_heads; ++g) {
        const Pattern& pattern = p.geometry.patterns[i];
        const std::int64_t held = rows_held(
            pattern, offset_of(p.geometry.offset_rule, g, p.kv_heads, pattern.ratio), p.tokens);
        if (static_cast<std::int64_t>(told[i].size()) != p.kv_heads ||
            told[i][static_cast<std::size_t>(g)] != held)
          return invalid_argument("longnet: state_rows[", i, "] disagrees: head ", g, " holds ",
                                  held, " rows after ", p.tokens, " tokens");
      }
    return {};
  }
};

}  // namespace

const Operator& attention_operator() {
  static const DilatedAttention kOperator;
  return kOperator;
}

const Operator& decode_operator() {
  static const DilatedDecode kOperator;
  return kOperator;
}

}  // namespace everlong::longnet
