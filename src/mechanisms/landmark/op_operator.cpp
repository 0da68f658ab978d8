#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

#include "mechanisms/landmark/op_call.h"
#include "mechanisms/landmark/op_cpu.h"
#include "ops/attention_refusals.h"
#include "ops/reference_call.h"

namespace everlong::landmark {
namespace {

at::Tensor by_composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& marks, const Options& options) {
  return attention(q, k, v, marks, {options.scale, options.drop_empty, Path::kComposite}).out;
}

at::Tensor by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& marks, const Options& options) {
  return attention(q, k, v, marks, {options.scale, options.drop_empty, Path::kCpu}).out;
}

class LandmarkAttention final : public Operator {
 public:
  std::string_view kind() const override { return "landmark_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_two_level"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const AttentionCall about, read_call(call));
    if (form.starts_with("reference")) {
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("q"), "landmark", form));
      if (form == "reference") return run_reference(reference::parallel, call, about);
      if (form == "reference_two_level") return run_reference(reference::two_level, call, about);
    }
    const Attend attend = form == "naive"       ? naive
                          : form == "composite" ? by_composite
                          : form == "cpu"       ? by_cpu_kernel
                                                : nullptr;
    if (attend == nullptr)
      return invalid_argument("landmark: \"", form,
                              "\" is not a form; known: composite, cpu, naive, reference, ",
                              "reference_two_level");
    if (form == "cpu")
      EVERLONG_RETURN_IF_ERROR(
          check_cpu_kernel(call.inputs.at("q"), call.inputs.at("k"), call.inputs.at("v")));
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
      return run_sequences(attend, inputs, state, about);
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
    if (!call.params.contains("block")) call.params["block"] = 8;
    if (!shape.initial_state) return call;
    const std::int64_t N = sequences_of(shape);
    std::vector<std::int64_t> lengths;
    for (std::int64_t n = 0; n < N; ++n)  // lengths of their own, one of them 0 of several
      lengths.push_back(n == 1 ? 0 : 11 + 7 * n);
    const std::int64_t rows = lengths.empty() ? 0 : std::ranges::max(lengths);
    const at::Tensor length = at::tensor(lengths, at::kLong);
    const at::Tensor padding = at::arange(rows) >= length.unsqueeze(1);
    const at::Tensor of_rows = padding.view({N, rows, 1, 1});
    call.state["k"] = draw({N, rows, G, shape.key_dim}).masked_fill(of_rows, 0);
    call.state["v"] = draw({N, rows, G, shape.value_dim}).masked_fill(of_rows, 0);
    call.state["length"] = length;
    const auto marks = regular_landmarks(0, rows, call.params["block"].get<std::int64_t>(),
                                         call.params.value("phase", std::int64_t{0}));
    call.state["is_landmark"] = at::tensor(at::ArrayRef<std::uint8_t>(marks), at::kByte)
                                    .unsqueeze(0)
                                    .expand({N, rows})
                                    .masked_fill(padding, 0);
    return call;
  }

  // A cache of keys and values is not an accumulator: it keeps what it was given.
  at::ScalarType state_dtype(at::ScalarType dtype) const override { return dtype; }
  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }

  std::vector<OpShape> law_shapes() const override {
    const auto blocks = [](std::int64_t size, std::int64_t phase) {
      return nlohmann::json{{"block", size}, {"phase", phase}};
    };
    return {
        {.tokens = 70,
         .heads = 4,
         .kv_heads = 2,
         .key_dim = 8,
         .value_dim = 24,
         .params = {{"scale", 0.5}, {"block", 16}}},
        {.tokens = 65, .heads = 4, .kv_heads = 1, .params = blocks(2, 0)},
        // The phase puts a landmark first: such a row sees nothing, or its block is empty.
        {.tokens = 33, .params = blocks(5, 4)},
        {.tokens = 33, .params = {{"block", 5}, {"phase", 4}, {"empty_block", "drop"}}},
        {.tokens = 150, .heads = 4, .kv_heads = 2, .params = blocks(51, 17)},
        {.tokens = 40, .params = blocks(1000, 0)},
        {.tokens = 90,
         .heads = 4,
         .kv_heads = 2,
         .cu_seqlens = {0, 31, 31, 32, 90},
         .initial_state = true,
         .params = blocks(7, 3)},
    };
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    AttentionRefusals list(*this);
    list.add("param_unknown", list.plain, [](OpCall& c) { c.params["blok"] = 3; });
    list.add("block_of_one", list.plain, [](OpCall& c) { c.params["block"] = 1; });
    list.add("block_fraction", list.plain, [](OpCall& c) { c.params["block"] = 2.5; });
    list.add("phase_negative", list.plain, [](OpCall& c) { c.params["phase"] = -1; });
    list.add("landmarks_nowhere", list.plain, [](OpCall& c) { c.params.erase("block"); });
    list.add("landmarks_twice", list.plain, [](OpCall& c) {
      c.inputs["is_landmark"] = at::zeros({1, 6}, at::kByte);
    });
    list.add("landmarks_of_other_length", list.plain, [](OpCall& c) {
      c.params.erase("block");
      c.inputs["is_landmark"] = at::zeros({1, 5}, at::kByte);
    });
    list.add("landmarks_of_floats", list.plain, [](OpCall& c) {
      c.params.erase("block");
      c.inputs["is_landmark"] = at::zeros({1, 6}, at::kDouble);
    });
    list.add("empty_block_unknown", list.plain,
             [](OpCall& c) { c.params["empty_block"] = "skip"; });
    list.add("not_causal", list.plain, [](OpCall& c) { c.params["causal"] = false; });
    list.add("scale_zero", list.plain, [](OpCall& c) { c.params["scale"] = 0; });
    list.add("state_of_another_width", list.carried,
             [](OpCall& c) { c.state["k"] = c.state["k"].narrow(3, 0, 8); });
    list.add("state_of_another_dtype", list.carried,
             [](OpCall& c) { c.state["k"] = c.state["k"].to(at::kFloat); });
    list.add("state_incomplete", list.carried, [](OpCall& c) { c.state.erase("is_landmark"); });
    list.add("state_length_past_its_rows", list.carried,
             [](OpCall& c) { c.state["length"] = c.state["length"] + 1; });
    list.add("state_length_of_floats", list.carried,
             [](OpCall& c) { c.state["length"] = c.state["length"].to(at::kDouble); });
    return std::move(list).take();
  }

  // As causal attention: landmarks stand where tokens stand. Two products of K and V multiply-adds
  // a pair forward, twice that backward. "step": the tokens are the past of one.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const bool step = pass == "step";
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(shape.batch), shape.tokens);
    if (!shape.cu_seqlens.empty()) lengths.clear();
    for (std::size_t n = 1; n < shape.cu_seqlens.size(); ++n)
      lengths.push_back(shape.cu_seqlens[n] - shape.cu_seqlens[n - 1]);
    const auto K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim),
               H = static_cast<double>(shape.heads), G = static_cast<double>(shape.kv_heads);
    double pairs = 0, queries = 0, keys = 0;
    for (const std::int64_t length : lengths) {
      const auto T = static_cast<double>(length);
      pairs += step ? T + 1 : T * (T + 1) / 2;
      queries += step ? 1 : T;
      keys += step ? T + 1 : T;
    }
    const double passes = pass == "train" ? 3 : 1;
    return {
        .flops = passes * 2 * pairs * H * (K + V),
        .bytes = passes * (queries * H + keys * G) * (K + V) * static_cast<double>(element_bytes)};
  }
};

}  // namespace

const Operator& attention_operator() {
  static const LandmarkAttention kOperator;
  return kOperator;
}

}  // namespace everlong::landmark
