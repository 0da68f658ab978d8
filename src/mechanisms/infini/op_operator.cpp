#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "mechanisms/infini/op_call.h"
#include "mechanisms/infini/op_cpu.h"
#include "ops/attention_refusals.h"
#include "ops/reference_call.h"

namespace everlong::infini {
namespace {

constexpr std::int64_t kSampleSegment = 16;  // several segments in every law

Mixed composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                const Options& options) {
  return infini_attention(q, k, v, beta, weight, before, options, Path::kComposite);
}

Mixed by_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                    const Options& options) {
  return infini_attention(q, k, v, beta, weight, before, options, Path::kCpu);
}

class InfiniOperator final : public Operator {
 public:
  explicit InfiniOperator(bool memory_only) : memory_only_(memory_only) {}

  std::string_view kind() const override {
    return memory_only_ ? "infini_memory" : "infini_attention";
  }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_scan"},
            {.name = "reference_slots"},
            {.name = "reference_pairs"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const Params params, read_call(call, memory_only_));
    if (form.starts_with("reference")) {
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("q"), "infini", form));
      const Reference oracle = form == "reference"         ? reference::stream
                               : form == "reference_scan"  ? reference::scan
                               : form == "reference_slots" ? reference::slots
                               : form == "reference_pairs" ? reference::explicit_pairs
                                                           : nullptr;
      if (oracle != nullptr) return run_reference(oracle, call, params);
    }
    const Form tensors = form == "naive"       ? naive
                         : form == "composite" ? composite
                         : form == "cpu"       ? by_cpu_kernel
                                               : nullptr;
    if (tensors == nullptr)
      return invalid_argument("infini: \"", form,
                              "\" is not a form; known: composite, cpu, naive, reference, "
                              "reference_pairs, reference_scan, reference_slots");
    if (form == "cpu")
      EVERLONG_RETURN_IF_ERROR(
          check_cpu_kernel(call.inputs.at("q"), call.inputs.at("k"), call.inputs.at("v")));
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
      return run_sequences(tensors, inputs, state, params);
    });
  }

  OpCall sample(const OpShape& shape) const override {
    const auto generator = at::detail::createCPUGenerator(shape.seed);
    const auto draw = [&](std::vector<std::int64_t> sizes) {
      return at::randn(sizes, generator, at::kDouble);
    };
    const auto positive = [&](std::vector<std::int64_t> sizes) {
      return at::rand(sizes, generator, at::kDouble) + 0.5;
    };
    OpCall call;
    const std::int64_t B = shape.batch, T = shape.tokens, G = shape.kv_heads, K = shape.key_dim,
                       V = shape.value_dim;
    // The second derivative of sigma jumps at 0, where differences of a finite step are off.
    const auto off_zero = [](const at::Tensor& x) { return x + 1e-2 * x.sign(); };
    call.inputs["q"] = off_zero(draw({B, T, shape.heads, K}));
    call.inputs["k"] = off_zero(draw({B, T, G, K}));
    call.inputs["v"] = draw({B, T, G, V});
    if (!memory_only_) call.inputs["beta"] = draw({shape.heads});
    call.inputs["write_weight"] = positive({B, T});
    if (T > 2) call.inputs["write_weight"].narrow(1, T / 2, 1).zero_();
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (!call.params.contains("segment")) call.params["segment"] = kSampleSegment;
    if (memory_only_)
      for (const char* key : {"empty", "rope", "gate", "softmax_scale"}) call.params.erase(key);
    if (!shape.initial_state) return call;
    const std::int64_t N = sequences_of(shape), C = call.params.at("segment").get<std::int64_t>();
    std::vector<std::int64_t> positions;
    std::int64_t rows = 0;
    for (std::int64_t n = 0; n < N; ++n) {  // phases of their own
      positions.push_back(C * (1 + n) + (3 + 2 * n) % C);
      rows = std::max(rows, positions.back() % C);
    }
    const at::Tensor position = at::tensor(positions, at::kLong);
    const at::Tensor behind = at::arange(rows) >= position.remainder(C).unsqueeze(1);
    // As if some tokens had been written: no mass is near zero.
    call.state["M"] = 3 * draw({N, G, K, V});
    call.state["z"] = 10 * positive({N, G, K});
    call.state["k"] = off_zero(draw({N, rows, G, K})).masked_fill(behind.view({N, rows, 1, 1}), 0);
    call.state["v"] = draw({N, rows, G, V}).masked_fill(behind.view({N, rows, 1, 1}), 0);
    call.state["weight"] = positive({N, rows}).masked_fill(behind, 0);
    call.state["position"] = position;
    return call;
  }

  std::vector<std::string> token_inputs() const override { return {"q", "k", "v", "write_weight"}; }

  std::vector<OpShape> law_shapes() const override {
    return {
        {.heads = 4,
         .kv_heads = 2,
         .key_dim = 8,
         .value_dim = 24,
         .params = {{"segment", 8}, {"update", "delta"}, {"softmax_scale", 0.5}}},
        {.heads = 4,
         .kv_heads = 1,
         .params =
             {{"segment", 7}, {"update", "delta"}, {"rope", "interleaved"}, {"empty", "zero"}}},
        {.params = {{"segment", 1}, {"rope", "none"}, {"gate", "hard_sigmoid_beta_times_memory"}}},
        // 64 tokens: the differences of law 4 (7 tokens) close no segment, and gamma, which counts
        // as a constant, does not matter to them.
        {.heads = 4,
         .kv_heads = 2,
         .params = {{"segment", 64}, {"update", "delta"}, {"delta_z", "armt"}}},
        {.tokens = 90,
         .heads = 4,
         .kv_heads = 2,
         .cu_seqlens = {0, 31, 31, 32, 90},
         .initial_state = true,
         .params = {{"update", "delta"}}},
        {.tokens = 40, .cu_seqlens = {0, 8, 16, 40}, .params = {{"segment", 8}}},
    };
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    AttentionRefusals list(*this);
    list.add("weights_of_another_length", list.plain, [](OpCall& c) {
      c.inputs["write_weight"] = c.inputs["write_weight"].narrow(1, 0, 5);
    });
    list.add("param_unknown", list.plain, [](OpCall& c) { c.params["segmnt"] = 3; });
    list.add("segment_zero", list.plain, [](OpCall& c) { c.params["segment"] = 0; });
    list.add("segment_fraction", list.plain, [](OpCall& c) { c.params["segment"] = 2.5; });
    list.add("rule_unknown", list.plain, [](OpCall& c) { c.params["update"] = "gradient"; });
    list.add("armt_with_the_linear_rule", list.plain,
             [](OpCall& c) { c.params["delta_z"] = "armt"; });
    list.add("state_announced_but_absent", list.plain,
             [](OpCall& c) { c.params["state_in"] = true; });
    if (!memory_only_) {
      list.add("gates_of_another_count", list.plain,
               [](OpCall& c) { c.inputs["beta"] = c.inputs["beta"].narrow(0, 0, 3); });
      list.add("rope_over_an_odd_dim", {.tokens = 6, .key_dim = 5}, [](OpCall&) {});
      list.add("memory_with_positions", list.plain, [](OpCall& c) { c.params["mem_pe"] = "rope"; });
      list.add("scale_zero", list.plain, [](OpCall& c) { c.params["softmax_scale"] = 0; });
    }
    list.add("state_of_another_width", list.carried,
             [](OpCall& c) { c.state["M"] = c.state["M"].narrow(3, 0, 8); });
    list.add("state_of_another_dtype", list.carried,
             [](OpCall& c) { c.state["z"] = c.state["z"].to(at::kFloat); });
    list.add("state_incomplete", list.carried, [](OpCall& c) { c.state.erase("position"); });
    list.add("state_without_its_mass", list.carried, [](OpCall& c) { c.state.erase("z"); });
    list.add("state_position_past_its_rows", list.carried,
             [](OpCall& c) { c.state["position"] = c.state["position"] + 9; });
    list.add("state_position_negative", list.carried,
             [](OpCall& c) { c.state["position"] = c.state["position"] * 0 - 1; });
    return std::move(list).take();
  }

  // Local pairs cost 2 (K + V) flops each forward, reading and writing the memory 2 K V each (and
  // the delta rule's gram matrix 2 K K); backward twice as much.
  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const auto C = static_cast<double>(shape.params.value("segment", kSampleSegment));
    const bool step = pass == "step";
    const double tokens =
        static_cast<double>(shape.batch) * (step ? 1 : static_cast<double>(shape.tokens));
    const auto K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim),
               H = static_cast<double>(shape.heads), G = static_cast<double>(shape.kv_heads);
    const double seen = std::min(static_cast<double>(shape.tokens), C) / 2;
    const bool delta = shape.params.value("update", "linear") == "delta";
    const double local = memory_only_ ? 0 : 2 * seen * (K + V) * H;
    const double memory = 2 * K * V * (H + G) + (delta ? 2 * K * K * G : 0);
    const double passes = pass == "train" ? 3 : 1;
    const double rows = (H + G) * (K + V) + (step ? seen * G * (K + V) : 0);
    const double held = step ? memory_bytes(shape.kv_heads, shape.key_dim, shape.value_dim) : 0;
    return {.flops = passes * tokens * (local + memory),
            .bytes = passes * tokens * (rows * static_cast<double>(element_bytes) + held)};
  }

 private:
  bool memory_only_;
};

}  // namespace

const Operator& attention_operator() {
  static const InfiniOperator kOperator(false);
  return kOperator;
}
const Operator& memory_operator() {
  static const InfiniOperator kOperator(true);
  return kOperator;
}

}  // namespace everlong::infini
