#include "eval/op_speed.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <everlong_build_info.h>

#include <algorithm>

#include "eval/op_gate.h"
#include "eval/released_longnet.h"
#include "eval/timing.h"
#include "ops/runtime.h"

namespace everlong {
namespace {

constexpr std::int64_t kMostNaiveTokens = 16384;  // its [T, T] weights are a gigabyte a head there

Result<const Operator*> find_operator(const OpBenchCase& wanted) {
  EVERLONG_ASSIGN(const Mechanism* room, find_mechanism(wanted.mechanism));
  std::vector<std::string> kinds;
  for (const Operator* op : room->operators) {
    if (!op->is_sequence()) continue;
    if (wanted.kind.empty() || op->kind() == wanted.kind) return op;
    kinds.emplace_back(op->kind());
  }
  return invalid_argument(wanted.mechanism, " has no operator \"", wanted.kind,
                          "\" over sequences; it has ", kinds.empty() ? "none" : join(kinds, ", "));
}

Result<std::string> find_form(const Operator& op, const OpBenchCase& wanted,
                              const std::string& asked) {
  const bool cuda = wanted.device.is_cuda();
  std::string composite;
  std::vector<std::string> fitting;
  for (const OpForm& form : op.forms()) {
    const bool fits = (cuda ? form.cuda : form.cpu) &&
                      (wanted.dtype == at::kDouble ? form.float64 : form.low_precision);
    if (!fits) continue;
    fitting.push_back(form.name);
    if (form.name == asked || (asked == "auto" && form.name == (cuda ? "cuda" : "cpu")))
      return form.name;
    if (form.name == "composite") composite = form.name;
  }
  if (asked == "auto" && !composite.empty()) return composite;
  return invalid_argument("form \"", asked, "\" of ", op.kind(), " does not run in ",
                          dtype_name(wanted.dtype), " on ", wanted.device.str(),
                          "; these do: ", fitting.empty() ? "none" : join(fitting, ", "));
}

TensorMap random_gradients(const TensorMap& outputs) {
  TensorMap gradients;
  for (const auto& [name, tensor] : outputs) gradients[name] = at::randn_like(tensor);
  return gradients;
}

// The case in its dtype, on its device, with a state before it when a single step is timed.
Result<OpCall> make_call(const Operator& op, const OpBenchCase& wanted, std::string_view form) {
  OpShape shape = wanted.shape;
  const bool step = wanted.pass == "step";
  if (step) shape.tokens += 1;
  OpCall call = cast_call(op, op.sample(shape), wanted.dtype, wanted.device);
  if (step) {
    EVERLONG_ASSIGN(const auto state,
                    state_after(op, form, call, wanted.shape.tokens, wanted.dtype));
    call = cast_call(op, slice_call(op, call, wanted.shape.tokens, shape.tokens, state),
                     wanted.dtype, wanted.device);
    for (auto& [name, tensor] : call.inputs) tensor = tensor.contiguous();
  }
  if (wanted.pass == "train") {
    EVERLONG_ASSIGN(const auto result, op.run(form, call));
    call.grad_out = random_gradients(result.out);
  }
  return call;
}

// Softmax attention by torch's own kernels over the same shapes, each head's keys and values
// included.
Result<std::function<void()>> sdpa_work(const OpBenchCase& wanted) {
  const auto& shape = wanted.shape;
  const bool step = wanted.pass == "step", train = wanted.pass == "train";
  const auto options = at::TensorOptions().dtype(wanted.dtype).device(wanted.device);
  const auto random = [&](std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    return at::randn({shape.batch, heads, tokens, dim}, options).set_requires_grad(train);
  };
  const std::int64_t keys = step ? shape.tokens + 1 : shape.tokens,
                     queries = step ? 1 : shape.tokens;
  const at::Tensor q = random(shape.heads, queries, shape.key_dim);
  const at::Tensor k = random(shape.kv_heads, keys, shape.key_dim);
  const at::Tensor v = random(shape.kv_heads, keys, shape.value_dim);
  const at::Tensor gradient =
      at::randn({shape.batch, shape.heads, queries, shape.value_dim}, options);
  const bool grouped = shape.heads != shape.kv_heads;
  return std::function<void()>([=, device = wanted.device] {
    const at::AutoGradMode mode(train);
    const at::Tensor out =
        at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/!step, {}, grouped);
    if (train) {
      for (const auto& tensor : {q, k, v}) tensor.mutable_grad() = at::Tensor();
      out.backward(gradient);
    }
    synchronize(device);
  });
}

Result<std::function<void()>> short_work(const Operator& op, const OpBenchCase& wanted,
                                         std::string_view timed_form) {
  const std::int64_t all = wanted.shape.tokens, each = wanted.short_tokens;
  if (wanted.pass == "step" || each < 1 || all % each != 0)
    return invalid_argument(
        "baseline short cuts the tokens of a forward or train pass into equal "
        "sequences: ",
        all, " tokens in sequences of ", each, wanted.pass == "step" ? " with pass step" : "",
        ". Give --lengths as multiples of the first one");
  OpBenchCase cut = wanted;
  cut.shape.tokens = each;
  EVERLONG_ASSIGN(auto call, make_call(op, cut, timed_form));
  return std::function<void()>([&op, form = std::string(timed_form), call = std::move(call),
                                times = all / each, device = wanted.device] {
    for (std::int64_t i = 0; i < times; ++i) throw_if_error(op.run(form, call).status());
    synchronize(device);
  });
}

Result<std::function<void()>> baseline_work(const Operator& op, const OpBenchCase& wanted,
                                            std::string_view timed_form, const OpCall& call) {
  if (wanted.baseline == "sdpa") return sdpa_work(wanted);
  if (wanted.baseline == "short") return short_work(op, wanted, timed_form);
  if (wanted.baseline == "released") return released_longnet_work(op, timed_form, call);
  if (wanted.baseline == "naive" && wanted.pass != "step" && wanted.shape.tokens > kMostNaiveTokens)
    return invalid_argument("baseline naive holds [T, T] weights; it is offered up to ",
                            kMostNaiveTokens, " tokens");
  EVERLONG_ASSIGN(const auto form, find_form(op, wanted, wanted.baseline));
  return std::function<void()>([&op, form, &call, device = wanted.device] {
    throw_if_error(op.run(form, call).status());
    synchronize(device);
  });
}

nlohmann::ordered_json describe(const OpBenchCase& wanted, const Operator& op,
                                const std::string& form) {
  const auto& shape = wanted.shape;
  return {{"mechanism", wanted.mechanism},
          {"kind", std::string(op.kind())},
          {"pass", wanted.pass},
          {"device", wanted.device.is_cuda() ? "cuda" : "cpu"},
          {"dtype", dtype_name(wanted.dtype)},
          {"form", form},
          {"batch", shape.batch},
          {"tokens", shape.tokens},
          {"heads", shape.heads},
          {"kv_heads", shape.kv_heads},
          {"head_dim", shape.key_dim},
          {"value_dim", shape.value_dim},
          {"threads", threads()}};
}

}  // namespace

Ceilings measure_ceilings(at::Device device, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const std::int64_t n = device.is_cuda() ? 8192 : 2048;
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const at::Tensor a = at::randn({n, n}, options), b = at::randn({n, n}, options);
  at::Tensor c = at::empty({n, n}, options);
  const std::int64_t size = std::int64_t{device.is_cuda() ? 1 << 30 : 256 << 20};
  const at::Tensor from = at::zeros({size}, options.dtype(at::kByte));
  at::Tensor to = at::zeros_like(from);
  const auto best = measure_in_turns({[&] {
                                        at::mm_out(c, a, b);
                                        synchronize(device);
                                      },
                                      [&] {
                                        to.copy_(from);
                                        synchronize(device);
                                      }},
                                     {.min_seconds = 0.3, .min_repeats = 3, .enough_seconds = 3});
  const double cube =
      2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  return {.flops = cube / best[0].min, .bytes = 2.0 * static_cast<double>(size) / best[1].min};
}

Result<OpBenchResult> bench_op(const OpBenchCase& wanted, const Ceilings& ceilings) {
  if (wanted.pass != "forward" && wanted.pass != "train" && wanted.pass != "step")
    return invalid_argument("pass \"", wanted.pass,
                            "\" is not known; allowed: forward, train, step");
  if (wanted.shape.tokens < 1 || wanted.shape.batch < 1)
    return invalid_argument("tokens = ", wanted.shape.tokens, ", batch = ", wanted.shape.batch,
                            "; both start at 1");
  EVERLONG_ASSIGN(const Operator* op, find_operator(wanted));
  EVERLONG_ASSIGN(const auto form, find_form(*op, wanted, wanted.form));
  OpBenchResult result;
  auto& record = result.record = describe(wanted, *op, form);
  EVERLONG_ASSIGN(const auto call, make_call(*op, wanted, form));
  const OpCost cost = op->cost(wanted.shape, wanted.pass, c10::elementSize(wanted.dtype));

  const bool step = wanted.pass == "step";
  const std::int64_t tokens = step ? 1 : wanted.shape.tokens;
  EVERLONG_ASSIGN(const auto gate, check_op(*op, form, call, tokens, wanted.dtype, cost.flops));
  record["max_rel_error"] = gate.max_rel_error;
  record["gate"] = gate.against;
  record["commit"] = build_info::kCommit;
  record["machine"] = machine_name(wanted.device);
  if (!gate.passed()) {
    record["error"] =
        cat(gate.worst, " is off by ", gate.max_rel_error, " of its largest value; allowed ",
            gate.allowed, ". A wrong result has no speed");
    return result;
  }

  std::vector<std::function<void()>> works = {[&] {
    throw_if_error(op->run(form, call).status());
    synchronize(wanted.device);
  }};
  if (wanted.baseline != "none") {
    EVERLONG_ASSIGN(auto work, baseline_work(*op, wanted, form, call));
    works.push_back(std::move(work));
  }
  const auto times = measure_in_turns(works);
  const double seconds = times[0].median;
  record["seconds"] = seconds;
  record["seconds_min"] = times[0].min;
  record["seconds_max"] = times[0].max;
  record["repeats"] = times[0].repeats;
  record["tokens_per_second"] = static_cast<double>(wanted.shape.batch * tokens) / seconds;
  record["baseline"] = wanted.baseline;
  record["baseline_seconds"] = nullptr;
  record["ratio"] = nullptr;
  if (times.size() > 1) {
    record["baseline_seconds"] = times[1].median;
    record["ratio"] = times[1].median / seconds;
  }
  record["bytes"] = cost.bytes;
  record["flops"] = cost.flops;
  record["bytes_ceiling"] = ceilings.bytes;
  record["flops_ceiling"] = ceilings.flops;
  record["fraction_of_ceiling"] =
      std::max(cost.flops / ceilings.flops, cost.bytes / ceilings.bytes) / seconds;
  result.passed = true;
  return result;
}

}  // namespace everlong
