#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "mechanisms/softmax/op_call.h"
#include "mechanisms/softmax/op_cpu.h"
#include "ops/attention_refusals.h"
#include "ops/reference_call.h"

namespace everlong::softmax {
namespace {

constexpr std::int64_t kOnlineBlock = 16;  // small, so that short cases have several blocks

std::vector<double> online_in_small_blocks(const reference::Problem& problem) {
  return reference::online(problem, kOnlineBlock);
}

template <Path path>
at::Tensor by_path(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const Options& options) {
  return attention(q, k, v, {options.window, options.scale, path});
}

class CausalAttention final : public Operator {
 public:
  std::string_view kind() const override { return "causal_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_recurrent"},
            {.name = "reference_online"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false},
            // what layers run on a GPU: the library's kernels where they fit
            {.name = "auto", .cpu = false, .cuda = true, .low_precision = true}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const Params params, read_call(call));
    const at::Tensor& q = call.inputs.at("q");
    if (form.starts_with("reference")) {
      EVERLONG_RETURN_IF_ERROR(require_reference_input(q, "softmax", form));
      if (form == "reference") return run_reference(reference::parallel, call, params);
      if (form == "reference_recurrent") return run_reference(reference::recurrent, call, params);
      if (form == "reference_online") return run_reference(online_in_small_blocks, call, params);
    }
    const Attend attend = form == "naive"       ? naive
                          : form == "composite" ? by_path<Path::kComposite>
                          : form == "cpu"       ? by_path<Path::kCpu>
                          : form == "auto"      ? by_path<Path::kAuto>
                                                : nullptr;
    if (attend == nullptr)
      return invalid_argument(
          "softmax: \"", form,
          "\" is not a form; known: auto, composite, cpu, naive, reference, reference_online, "
          "reference_recurrent");
    if (form == "cpu")
      EVERLONG_RETURN_IF_ERROR(check_cpu_kernel(q, call.inputs.at("k"), call.inputs.at("v")));
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
      return run_sequences(attend, inputs, state, params);
    });
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
    call.params = shape.params;
    if (!shape.initial_state) return call;
    const std::int64_t N = sequences_of(shape);
    const std::int64_t window = shape.params.value("window", std::int64_t{0});
    std::vector<std::int64_t> lengths;
    std::int64_t rows = 0;
    for (std::int64_t n = 0; n < N;
         ++n) {  // lengths of their own, one of them 0 where there are several
      const std::int64_t length = n == 1 ? 0 : 11 + 7 * n;
      lengths.push_back(window > 0 ? std::min(length, window - 1) : length);
      rows = std::max(rows, lengths.back());
    }
    const at::Tensor length = at::tensor(lengths, at::kLong);
    const at::Tensor padding = (at::arange(rows) >= length.unsqueeze(1)).view({N, rows, 1, 1});
    call.state["k"] = draw({N, rows, G, shape.key_dim}).masked_fill(padding, 0);
    call.state["v"] = draw({N, rows, G, shape.value_dim}).masked_fill(padding, 0);
    call.state["length"] = length;
    return call;
  }

  // A cache of keys and values is not an accumulator: it keeps what it was given.
  at::ScalarType state_dtype(at::ScalarType dtype) const override { return dtype; }
  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }

  std::vector<OpShape> law_shapes() const override {
    const auto window = [](std::int64_t size) { return nlohmann::json{{"window", size}}; };
    return {
        {.tokens = 70,
         .heads = 4,
         .kv_heads = 2,
         .key_dim = 8,
         .value_dim = 24,
         .params = {{"scale", 0.5}}},
        {.batch = 2, .tokens = 65, .heads = 4, .kv_heads = 1, .params = window(7)},
        {.tokens = 33, .heads = 2, .kv_heads = 2, .params = window(1)},
        {.tokens = 150, .heads = 4, .kv_heads = 2, .initial_state = true, .params = window(64)},
        {.tokens = 90,
         .heads = 4,
         .kv_heads = 2,
         .cu_seqlens = {0, 31, 31, 32, 90},
         .initial_state = true},
        {.tokens = 90, .cu_seqlens = {0, 5, 20, 90}, .initial_state = true, .params = window(7)},
        {.batch = 3,
         .tokens = 40,
         .heads = 4,
         .kv_heads = 2,
         .key_dim = 24,
         .value_dim = 8,
         .initial_state = true},
    };
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    AttentionRefusals list(*this);
    list.add("param_unknown", list.plain, [](OpCall& c) { c.params["windw"] = 3; });
    list.add("window_negative", list.plain, [](OpCall& c) { c.params["window"] = -1; });
    list.add("window_fraction", list.plain, [](OpCall& c) { c.params["window"] = 2.5; });
    list.add("scale_zero", list.plain, [](OpCall& c) { c.params["scale"] = 0; });
    list.add("state_of_another_width", list.carried,
             [](OpCall& c) { c.state["k"] = c.state["k"].narrow(3, 0, 8); });
    list.add("state_of_another_dtype", list.carried,
             [](OpCall& c) { c.state["k"] = c.state["k"].to(at::kFloat); });
    list.add("state_incomplete", list.carried, [](OpCall& c) { c.state.erase("length"); });
    list.add("state_length_past_its_rows", list.carried,
             [](OpCall& c) { c.state["length"] = c.state["length"] + 1; });
    list.add("state_length_negative", list.carried,
             [](OpCall& c) { c.state["length"] = c.state["length"] * 0 - 1; });
    list.add("state_length_of_floats", list.carried,
             [](OpCall& c) { c.state["length"] = c.state["length"].to(at::kDouble); });
    return std::move(list).take();
  }

  // Two products of K and V multiply-adds a pair forward, twice that backward. "step": the tokens
  // are the past of one.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const std::int64_t window = shape.params.value("window", std::int64_t{0});
    const bool step = pass == "step";
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(shape.batch), shape.tokens);
    if (!shape.cu_seqlens.empty()) lengths.clear();
    for (std::size_t n = 1; n < shape.cu_seqlens.size(); ++n)
      lengths.push_back(shape.cu_seqlens[n] - shape.cu_seqlens[n - 1]);
    const auto K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim),
               H = static_cast<double>(shape.heads), G = static_cast<double>(shape.kv_heads);
    double pairs = 0, queries = 0, keys = 0;
    for (const std::int64_t length : lengths) {
      const double seen = visible_pairs(length, 1, window);
      pairs += step ? seen : visible_pairs(0, length, window);
      queries += step ? 1 : static_cast<double>(length);
      keys += step ? seen : static_cast<double>(length);
    }
    const double passes =
        pass == "train" ? 3 : 1;  // in bytes: read q k v go out, write dq dk dv, after the forward
    return {
        .flops = passes * 2 * pairs * H * (K + V),
        .bytes = passes * (queries * H + keys * G) * (K + V) * static_cast<double>(element_bytes)};
  }
};

}  // namespace

const Operator& attention_operator() {
  static const CausalAttention kOperator;
  return kOperator;
}

}  // namespace everlong::softmax
