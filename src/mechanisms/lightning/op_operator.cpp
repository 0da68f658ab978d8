// The room's operators behind the interface that the laws, golden_check and the benchmark use.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <limits>

#include "mechanisms/lightning/op.h"
#include "mechanisms/lightning/op_call.h"
#include "mechanisms/lightning/params.h"
#include "ops/reference_call.h"

namespace everlong::lightning {
namespace {

class AttentionOperator final : public Operator {
 public:
  std::string_view kind() const override { return "decay_linear_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_chunked"},
            {.name = "reference_recurrent"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false},
            // what layers run on a GPU: the CUDA kernels where they fit
            {.name = "auto", .cpu = false, .cuda = true, .low_precision = true}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    return run_form(form, call);
  }

  OpCall sample(const OpShape& shape) const override {
    auto generator = at::detail::createCPUGenerator(shape.seed);
    const auto draw = [&](std::int64_t heads, std::int64_t dim) {
      return at::randn({shape.batch, shape.tokens, heads, dim}, generator, at::kDouble);
    };
    OpCall call;
    call.params["scale"] = 0.7;
    call.params.update(shape.params);
    call.cu_seqlens = shape.cu_seqlens;
    call.inputs["q"] = draw(shape.heads, shape.key_dim);
    call.inputs["k"] = draw(shape.heads, shape.key_dim);
    call.inputs["v"] = draw(shape.heads, shape.value_dim);
    // The published range of one layer; from three heads on also the two ends, no decay and
    // forgetting at once.
    auto slope = slopes(SlopeRule::kAlibi, shape.heads, 0, 1);
    if (slope.ok() && shape.heads >= 3) slope->front() = 8.0, slope->back() = 0.0;
    call.inputs["slope"] = at::tensor(slope.ok() ? *slope : std::vector<double>(), at::kDouble);
    if (shape.initial_state)
      call.state["S"] =
          at::randn({sequences_of(shape), shape.heads, shape.key_dim, shape.value_dim}, generator,
                    at::kDouble);
    return call;
  }

  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }
  std::vector<std::string> host_inputs() const override { return {"slope"}; }

  std::vector<OpShape> law_shapes() const override {
    return {{.heads = 3, .key_dim = 12, .value_dim = 5, .params = {{"scale", 1.0}}},
            {.heads = 1, .key_dim = 8, .value_dim = 24, .params = {{"scale", 0.25}}},
            {.heads = 4, .key_dim = 1, .value_dim = 1},
            {.key_dim = 16, .value_dim = 8, .params = {{"silu", "qk"}, {"row_squares", true}}},
            {.key_dim = 8, .value_dim = 16, .params = {{"silu", "v"}}}};
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    std::vector<std::pair<std::string, OpCall>> out;
    const auto add = [&](const std::string& what, const auto& spoil) {
      OpCall call = sample({.batch = 1,
                            .tokens = 6,
                            .heads = 2,
                            .key_dim = 4,
                            .value_dim = 3,
                            .initial_state = true});
      spoil(call);
      out.emplace_back(what, std::move(call));
    };
    const auto packed = [&](const std::string& what, std::vector<std::int64_t> offsets,
                            std::int64_t sequences) {
      add(what, [&](OpCall& c) {
        c.cu_seqlens = std::move(offsets);
        c.state["S"] = at::zeros({sequences, 2, 4, 3}, at::kDouble);
      });
    };
    const double inf = std::numeric_limits<double>::infinity(),
                 nan = std::numeric_limits<double>::quiet_NaN();
    add("a negative slope", [](OpCall& c) { c.inputs["slope"][1] = -0.02; });
    add("a NaN slope", [&](OpCall& c) { c.inputs["slope"][0] = nan; });
    add("an infinite slope", [&](OpCall& c) { c.inputs["slope"][0] = inf; });
    add("one slope too few", [](OpCall& c) { c.inputs["slope"] = at::zeros({1}, at::kDouble); });
    add("slopes in two dimensions", [](OpCall& c) {
      c.inputs["slope"] = at::zeros({1, 2}, at::kDouble);
    });
    add("whole-number slopes", [](OpCall& c) { c.inputs["slope"] = at::ones({2}, at::kLong); });
    add("no slopes", [](OpCall& c) { c.inputs.erase("slope"); });
    add("an unknown input", [](OpCall& c) { c.inputs["gate"] = at::zeros({1}, at::kDouble); });
    add("a scale that is no number", [](OpCall& c) { c.params["scale"] = "one"; });
    add("silu of the output", [](OpCall& c) { c.params["silu"] = "qo"; });
    add("a number of row squares", [](OpCall& c) { c.params["row_squares"] = 1; });
    packed("offsets that start late", {1, 6}, 1);
    packed("offsets that decrease", {0, 4, 2, 6}, 3);
    packed("offsets that end early", {0, 5}, 1);
    packed("offsets past the end", {0, 7}, 1);
    packed("negative offsets", {0, -1, 6}, 2);
    packed("a single offset", {0}, 0);
    add("packed sequences in two rows", [](OpCall& c) {
      for (const char* name : {"q", "k", "v"}) c.inputs[name] = c.inputs[name].repeat({2, 1, 1, 1});
      c.cu_seqlens = {0, 6};
    });
    add("keys of another dim", [](OpCall& c) {
      c.inputs["k"] = at::zeros({1, 6, 2, 5}, at::kDouble);
    });
    add("values of other tokens", [](OpCall& c) {
      c.inputs["v"] = at::zeros({1, 5, 2, 3}, at::kDouble);
    });
    add("values of another batch", [](OpCall& c) {
      c.inputs["v"] = at::zeros({2, 6, 2, 3}, at::kDouble);
    });
    add("fewer key heads", [](OpCall& c) { c.inputs["k"] = at::zeros({1, 6, 1, 4}, at::kDouble); });
    add("no values", [](OpCall& c) { c.inputs.erase("v"); });
    add("queries in three dimensions", [](OpCall& c) { c.inputs["q"] = c.inputs["q"].squeeze(0); });
    add("whole numbers", [](OpCall& c) {
      for (const char* name : {"q", "k", "v"}) c.inputs[name] = c.inputs[name].to(at::kInt);
    });
    add("mixed dtypes", [](OpCall& c) { c.inputs["v"] = c.inputs["v"].to(at::kFloat); });
    add("a value dim of zero", [](OpCall& c) {
      c.inputs["v"] = at::zeros({1, 6, 2, 0}, at::kDouble);
    });
    add("no heads", [](OpCall& c) {
      for (const char* name : {"q", "k", "v"})
        c.inputs[name] = at::zeros({1, 6, 0, 4}, at::kDouble);
      c.inputs["slope"] = at::zeros({0}, at::kDouble);
    });
    add("a state of other heads", [](OpCall& c) {
      c.state["S"] = at::zeros({1, 3, 4, 3}, at::kDouble);
    });
    add("a transposed state", [](OpCall& c) { c.state["S"] = c.state["S"].mT(); });
    add("a state for two sequences", [](OpCall& c) {
      c.state["S"] = at::zeros({2, 2, 4, 3}, at::kDouble);
    });
    add("a state of whole numbers", [](OpCall& c) { c.state["S"] = c.state["S"].to(at::kInt); });
    add("a state by another name", [](OpCall& c) { c.state = {{"kv", c.state["S"]}}; });
    return out;
  }

  // Fewest operations: the recurrence, an update and a product with K x V a token forward, five
  // times that backward less what a stored state saves. Fewest bytes: q, k, v, o once, the state in
  // and out.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const auto K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim);
    // A step costs the same after any number of tokens.
    const std::int64_t tokens = pass == "step" ? 1 : shape.tokens;
    const double rows = static_cast<double>(shape.batch * tokens * shape.heads);
    const auto N = static_cast<double>(sequences_of(shape));
    const double state = 2 * N * static_cast<double>(shape.heads) * K * V *
                         static_cast<double>(element_bytes > 4 ? 8 : 4);
    const auto size = static_cast<double>(element_bytes);
    OpCost cost{.flops = rows * 4 * K * V, .bytes = rows * (2 * K + 2 * V) * size + state};
    if (pass == "train") {
      cost.flops += rows * 10 * K * V;
      cost.bytes += rows * (4 * K + 3 * V) * size + state;
    }
    return cost;
  }
};

class SlopesOperator final : public Operator {
 public:
  std::string_view kind() const override { return "slopes"; }
  bool is_sequence() const override { return false; }
  std::vector<OpForm> forms() const override { return {{.name = "reference"}}; }

  // params: rule, n_heads, layers = [[l, L], ...]; out.slope [len(layers), H].
  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    if (form != "reference")
      return invalid_argument("lightning: \"", form,
                              "\" is not a form of slopes; known: reference");
    const auto member = [&](const char* name) {
      const auto found = call.params.find(name);
      return found == call.params.end() ? nlohmann::json() : *found;
    };
    const auto rule_name = member("rule"), heads = member("n_heads"), layers = member("layers");
    if (!rule_name.is_string() || !heads.is_number_integer() || !layers.is_array() ||
        layers.empty())
      return invalid_argument(
          "lightning: slopes need params rule (text), n_heads and layers [[l, L], ...]; given ",
          call.params.dump());
    EVERLONG_ASSIGN(const SlopeRule rule, parse_slope_rule(rule_name.get<std::string>()));
    std::vector<double> values;
    for (const auto& layer : layers) {
      if (!layer.is_array() || layer.size() != 2 || !layer[0].is_number_integer() ||
          !layer[1].is_number_integer())
        return invalid_argument("lightning: a layer of slopes is [l, L]; given ", layer.dump());
      EVERLONG_ASSIGN(const auto slope,
                      slopes(rule, heads.get<std::int64_t>(), layer[0].get<std::int64_t>(),
                             layer[1].get<std::int64_t>()));
      values.insert(values.end(), slope.begin(), slope.end());
    }
    OpResult result;
    result.out["slope"] =
        from_doubles(values, {static_cast<std::int64_t>(layers.size()), heads.get<std::int64_t>()});
    return result;
  }

  OpCall sample(const OpShape& shape) const override {
    OpCall call;
    call.params = {{"rule", "alibi"}, {"n_heads", shape.heads}, {"layers", {{0, 1}}}};
    return call;
  }
  std::vector<std::string> token_inputs() const override { return {}; }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    OpCall rule = sample({}), heads = sample({}), layer = sample({});
    rule.params["rule"] = "steep";
    heads.params["n_heads"] = 0;
    layer.params["layers"] = {{2, 2}};
    return {{"an unknown rule", rule}, {"no heads", heads}, {"a layer past the last", layer}};
  }
  OpCost cost(const OpShape&, std::string_view, std::size_t) const override { return {}; }
};

}  // namespace

const Operator& attention_operator() {
  static const AttentionOperator op;
  return op;
}
const Operator& slopes_operator() {
  static const SlopesOperator op;
  return op;
}

}  // namespace everlong::lightning
