#include "mechanisms/softmax/op_kind.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <set>

#include "core/settings.h"
#include "mechanisms/softmax/op.h"
#include "mechanisms/softmax/params.h"
#include "mechanisms/softmax/reference.h"

namespace everlong::softmax {
namespace {

constexpr std::int64_t kLongestWindow = std::int64_t{1} << 62;
constexpr std::int64_t kOnlineBlock = 16;  // small, so that short cases have several blocks

Status check_names(const TensorMap& given, const std::set<std::string>& known, const char* what) {
  for (const auto& [name, tensor] : given)
    if (!known.contains(name))
      return invalid_argument("softmax: ", what, " \"", name, "\" is not known; known: ",
                              join(std::vector<std::string>(known.begin(), known.end()), ", "));
  for (const auto& name : known)
    if (!given.contains(name)) return invalid_argument("softmax: ", what, " \"", name, "\" is missing");
  return {};
}

Result<Params> read_call(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"q", "k", "v"}, "input"));
  if (!call.state.empty()) EVERLONG_RETURN_IF_ERROR(check_names(call.state, {"k", "v", "length"}, "state"));
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  std::vector<std::pair<std::string, at::Tensor>> numbers = {{"q", q}, {"k", k}, {"v", v}};
  if (!call.state.empty()) {
    numbers.emplace_back("state k", call.state.at("k"));
    numbers.emplace_back("state v", call.state.at("v"));
  }
  for (const auto& [name, tensor] : numbers)
    if (!tensor.is_floating_point() || tensor.scalar_type() != q.scalar_type() || tensor.device() != q.device())
      return invalid_argument("softmax: ", name, " is ", tensor.scalar_type(), " on ", tensor.device().str(), " and q ",
                              q.scalar_type(), " on ", q.device().str(),
                              "; one floating-point dtype and one device are needed");

  Params params;
  params.cu_seqlens = call.cu_seqlens;
  const at::Tensor none;
  const at::Tensor& state_k = call.state.empty() ? none : call.state.at("k");
  const at::Tensor& state_v = call.state.empty() ? none : call.state.at("v");
  const auto shape = [](const at::Tensor& t) { return t.defined() ? Shape(t.sizes().data(), t.sizes().size()) : Shape(); };
  EVERLONG_RETURN_IF_ERROR(read_shapes(shape(q), shape(k), shape(v), shape(state_k), shape(state_v), params));
  if (!call.state.empty()) {
    const at::Tensor& length = call.state.at("length");
    if (length.scalar_type() != at::kLong || length.dim() != 1)
      return invalid_argument("softmax: state length is ", length.scalar_type(), " with ", length.dim(),
                              " dimensions; int64 [", params.sequences(), "] is needed");
    const at::Tensor host = length.to(at::kCPU).contiguous();
    params.state_lengths.assign(host.data_ptr<std::int64_t>(), host.data_ptr<std::int64_t>() + host.numel());
    if (params.state_lengths.empty() && params.sequences() > 0)
      return invalid_argument("softmax: state length is empty for ", params.sequences(), " sequences");
  }
  Settings settings(call.params, "softmax: params");
  params.scale = settings.number("scale", default_scale(std::max<std::int64_t>(params.key_dim, 1)), -1e30, 1e30);
  params.window = settings.integer("window", 0, 0, kLongestWindow);
  EVERLONG_RETURN_IF_ERROR(settings.finish());
  EVERLONG_RETURN_IF_ERROR(validate(params));
  return params;
}

// New rows of sequence n, [1, length, heads, dim].
at::Tensor tokens_of(const at::Tensor& x, const Params& p, std::int64_t n) {
  return p.cu_seqlens.empty() ? x.narrow(0, n, 1) : x.narrow(1, p.first_token(n), p.length(n));
}

// Past and new rows of sequence n, [1, past + length, G, dim].
at::Tensor rows_of(const at::Tensor& x, const TensorMap& state, const std::string& name, const Params& p,
                   std::int64_t n) {
  const at::Tensor fresh = tokens_of(x, p, n);
  if (p.past(n) == 0) return fresh;
  return at::cat({state.at(name).narrow(0, n, 1).narrow(1, 0, p.past(n)), fresh}, 1);
}

// The last rows of every sequence, padded with zeros to the longest.
at::Tensor final_rows(const std::vector<at::Tensor>& rows, const Params& p) {
  std::int64_t longest = 0;
  for (std::int64_t n = 0; n < p.sequences(); ++n) longest = std::max(longest, p.kept(n));
  std::vector<at::Tensor> padded;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const at::Tensor& all = rows[static_cast<std::size_t>(n)];
    const at::Tensor kept = all.narrow(1, all.size(1) - p.kept(n), p.kept(n));
    padded.push_back(at::constant_pad_nd(kept, {0, 0, 0, 0, 0, longest - p.kept(n)}));
  }
  return at::cat(padded, 0);
}

using Attend = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Options&);

OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state, const Params& p) {
  const at::Tensor &q = inputs.at("q"), &k = inputs.at("k"), &v = inputs.at("v");
  const Options options{p.window, p.scale};
  OpResult result;
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 0; n < p.sequences(); ++n) lengths.push_back(p.kept(n));
  result.state["length"] = at::tensor(lengths, at::kLong).to(q.device());

  if (p.cu_seqlens.empty() && p.state_lengths.empty()) {  // every row alike: one call, and the cache is k and v
    const std::int64_t kept = p.batch > 0 ? p.kept(0) : 0;
    result.out["o"] = attend(q, k, v, options);
    result.state["k"] = k.narrow(1, p.tokens - kept, kept);
    result.state["v"] = v.narrow(1, p.tokens - kept, kept);
    return result;
  }
  std::vector<at::Tensor> outputs, keys, values;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    keys.push_back(rows_of(k, state, "k", p, n));
    values.push_back(rows_of(v, state, "v", p, n));
    outputs.push_back(attend(tokens_of(q, p, n), keys.back(), values.back(), options));
  }
  const bool packed = !p.cu_seqlens.empty();
  result.out["o"] = at::cat(outputs, packed ? 1 : 0);
  result.state["k"] = final_rows(keys, p);
  result.state["v"] = final_rows(values, p);
  return result;
}

std::span<const double> numbers(const at::Tensor& contiguous) {
  return {contiguous.const_data_ptr<double>(), static_cast<std::size_t>(contiguous.numel())};
}
at::Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef shape) {
  return at::tensor(values, at::kDouble).reshape(shape);
}

using Reference = std::vector<double> (*)(const reference::Problem&);

// Gradients by hand: a row of the final state is a row of the keys, so its incoming gradient is added to that row's.
OpResult run_reference(Reference form, const OpCall& call, const Params& p) {
  const auto dense = [](TensorMap map) {
    for (auto& [name, tensor] : map) tensor = tensor.detach().contiguous();
    return map;
  };
  const TensorMap inputs = dense(call.inputs), state = dense(call.state), grad_out = dense(call.grad_out);
  const bool wanted = !call.grad_out.empty();
  OpResult result;
  const auto options = inputs.at("q").options();
  result.out["o"] = at::zeros({p.batch, p.tokens, p.heads, p.value_dim}, options);
  if (wanted) {
    for (const auto& [name, tensor] : inputs) result.grad[name] = at::zeros_like(tensor);
    for (const char* name : {"k", "v"})
      if (state.contains(name)) result.grad[cat("state.", name)] = at::zeros_like(state.at(name));
  }
  std::vector<at::Tensor> keys, values;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const at::Tensor q = tokens_of(inputs.at("q"), p, n).contiguous();
    keys.push_back(rows_of(inputs.at("k"), state, "k", p, n).contiguous());
    values.push_back(rows_of(inputs.at("v"), state, "v", p, n).contiguous());
    reference::Problem problem{p.length(n), p.past(n),    p.heads,  p.kv_heads,    p.key_dim,
                               p.value_dim, p.window,     p.scale,  numbers(q),    numbers(keys.back()),
                               numbers(values.back())};
    tokens_of(result.out["o"], p, n).copy_(tensor_of(form(problem), {1, p.length(n), p.heads, p.value_dim}));
    if (!wanted) continue;

    TensorMap d = {{"q", at::zeros_like(q)}, {"k", at::zeros_like(keys.back())}, {"v", at::zeros_like(values.back())}};
    if (grad_out.contains("o")) {
      const at::Tensor go = tokens_of(grad_out.at("o"), p, n).contiguous();
      const auto by_hand = reference::gradients(problem, numbers(go));
      d["q"] = tensor_of(by_hand.q, q.sizes());
      d["k"] = tensor_of(by_hand.k, keys.back().sizes());
      d["v"] = tensor_of(by_hand.v, values.back().sizes());
    }
    tokens_of(result.grad["q"], p, n).copy_(d["q"]);
    for (const char* name : {"k", "v"}) {
      const std::int64_t all = d[name].size(1), kept = p.kept(n);
      if (const auto carried = grad_out.find(cat("state.", name)); carried != grad_out.end())
        d[name].narrow(1, all - kept, kept).add_(carried->second.narrow(0, n, 1).narrow(1, 0, kept));
      tokens_of(result.grad[name], p, n).copy_(d[name].narrow(1, p.past(n), p.length(n)));
      if (p.past(n) > 0)
        result.grad[cat("state.", name)].narrow(0, n, 1).narrow(1, 0, p.past(n)).copy_(
            d[name].narrow(1, 0, p.past(n)));
    }
  }
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 0; n < p.sequences(); ++n) lengths.push_back(p.kept(n));
  result.state["length"] = at::tensor(lengths, at::kLong);
  if (p.sequences() > 0) {
    result.state["k"] = final_rows(keys, p);
    result.state["v"] = final_rows(values, p);
  }
  return result;
}

std::vector<double> online_in_small_blocks(const reference::Problem& problem) {
  return reference::online(problem, kOnlineBlock);
}

class CausalAttention final : public Operator {
 public:
  std::string_view kind() const override { return "causal_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_recurrent"},
            {.name = "reference_online"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const Params params, read_call(call));
    const at::Tensor& q = call.inputs.at("q");
    if (form.starts_with("reference")) {
      if (q.scalar_type() != at::kDouble || !q.is_cpu())
        return unsupported("softmax: form ", form, " takes fp64 on the CPU; q is ", q.scalar_type(), " on ",
                           q.device().str());
      if (form == "reference") return run_reference(reference::parallel, call, params);
      if (form == "reference_recurrent") return run_reference(reference::recurrent, call, params);
      if (form == "reference_online") return run_reference(online_in_small_blocks, call, params);
    }
    const Attend attend = form == "naive" ? naive : form == "composite" ? attention : nullptr;
    if (attend == nullptr)
      return invalid_argument("softmax: \"", form,
                              "\" is not a form; known: composite, naive, reference, reference_online, "
                              "reference_recurrent");
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap& state) {
      return run_sequences(attend, inputs, state, params);
    });
  }

  OpCall sample(const OpShape& shape) const override {
    const auto generator = at::detail::createCPUGenerator(shape.seed);
    const auto draw = [&](std::vector<std::int64_t> sizes) { return at::randn(sizes, generator, at::kDouble); };
    OpCall call;
    const std::int64_t B = shape.batch, T = shape.tokens, G = shape.kv_heads;
    call.inputs["q"] = draw({B, T, shape.heads, shape.key_dim});
    call.inputs["k"] = draw({B, T, G, shape.key_dim});
    call.inputs["v"] = draw({B, T, G, shape.value_dim});
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (!shape.initial_state) return call;
    const std::int64_t N = shape.cu_seqlens.empty() ? B : static_cast<std::int64_t>(shape.cu_seqlens.size()) - 1;
    const std::int64_t window = shape.params.value("window", std::int64_t{0});
    std::vector<std::int64_t> lengths;
    std::int64_t rows = 0;
    for (std::int64_t n = 0; n < N; ++n) {  // lengths of their own, one of them 0 where there are several
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

  std::vector<std::string> token_inputs() const override { return {"q", "k", "v"}; }

  std::vector<OpShape> law_shapes() const override {
    const auto window = [](std::int64_t size) { return nlohmann::json{{"window", size}}; };
    return {
        {.tokens = 70, .heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 24, .params = {{"scale", 0.5}}},
        {.batch = 2, .tokens = 65, .heads = 4, .kv_heads = 1, .params = window(7)},
        {.tokens = 33, .heads = 2, .kv_heads = 2, .params = window(1)},
        {.tokens = 150, .heads = 4, .kv_heads = 2, .initial_state = true, .params = window(64)},
        {.tokens = 90, .heads = 4, .kv_heads = 2, .cu_seqlens = {0, 31, 31, 32, 90}, .initial_state = true},
        {.tokens = 90, .cu_seqlens = {0, 5, 20, 90}, .initial_state = true, .params = window(7)},
        {.batch = 3, .tokens = 40, .heads = 4, .kv_heads = 2, .key_dim = 24, .value_dim = 8, .initial_state = true},
    };
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    std::vector<std::pair<std::string, OpCall>> list;
    const auto add = [&](const char* name, const OpShape& shape, auto&& change) {
      OpCall call = sample(shape);
      change(call);
      list.emplace_back(name, std::move(call));
    };
    const OpShape plain{.tokens = 6, .heads = 4, .kv_heads = 2}, two{.batch = 2, .tokens = 6},
        packed{.tokens = 6, .cu_seqlens = {0, 2, 6}}, carried{.tokens = 6, .initial_state = true};
    add("heads_not_a_multiple", plain, [](OpCall& c) { c.inputs["q"] = c.inputs["q"].narrow(2, 0, 3); });
    add("key_dims_differ", plain, [](OpCall& c) { c.inputs["q"] = c.inputs["q"].narrow(3, 0, 8); });
    add("tokens_differ", plain, [](OpCall& c) { c.inputs["k"] = c.inputs["k"].narrow(1, 0, 5); });
    add("three_dimensions", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].select(0, 0); });
    add("value_heads_differ", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].narrow(2, 0, 1); });
    add("mixed_dtypes", plain, [](OpCall& c) { c.inputs["k"] = c.inputs["k"].to(at::kFloat); });
    add("integers", plain, [](OpCall& c) { for (auto& [name, x] : c.inputs) x = x.to(at::kLong); });
    add("input_missing", plain, [](OpCall& c) { c.inputs.erase("v"); });
    add("input_unknown", plain, [](OpCall& c) { c.inputs["slope"] = c.inputs["q"]; });
    add("param_unknown", plain, [](OpCall& c) { c.params["windw"] = 3; });
    add("window_negative", plain, [](OpCall& c) { c.params["window"] = -1; });
    add("window_fraction", plain, [](OpCall& c) { c.params["window"] = 2.5; });
    add("scale_zero", plain, [](OpCall& c) { c.params["scale"] = 0; });
    add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
    add("offsets_past_the_end", packed, [](OpCall& c) { c.cu_seqlens = {0, 2, 7}; });
    add("offsets_short_of_the_end", packed, [](OpCall& c) { c.cu_seqlens = {0, 2, 5}; });
    add("offsets_start_late", packed, [](OpCall& c) { c.cu_seqlens = {1, 6}; });
    add("offsets_with_a_batch", two, [](OpCall& c) { c.cu_seqlens = {0, 6}; });
    add("state_of_another_batch", carried, [](OpCall& c) { c.state = CausalAttention().sample({.batch = 2, .tokens = 6, .initial_state = true}).state; });
    add("state_of_another_width", carried, [](OpCall& c) { c.state["k"] = c.state["k"].narrow(3, 0, 8); });
    add("state_of_another_dtype", carried, [](OpCall& c) { c.state["k"] = c.state["k"].to(at::kFloat); });
    add("state_incomplete", carried, [](OpCall& c) { c.state.erase("length"); });
    add("state_length_past_its_rows", carried, [](OpCall& c) { c.state["length"] = c.state["length"] + 1; });
    add("state_length_negative", carried, [](OpCall& c) { c.state["length"] = c.state["length"] * 0 - 1; });
    add("state_length_of_floats", carried, [](OpCall& c) { c.state["length"] = c.state["length"].to(at::kDouble); });
    return list;
  }

  // Two products of K and V multiply-adds a pair forward, twice that backward. "step": the tokens are the past of one.
  OpCost cost(const OpShape& shape, std::string_view pass, std::size_t element_bytes) const override {
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
    const double passes = pass == "train" ? 3 : 1;  // in bytes: read q k v go out, write dq dk dv, after the forward
    return {.flops = passes * 2 * pairs * H * (K + V),
            .bytes = passes * (queries * H + keys * G) * (K + V) * static_cast<double>(element_bytes)};
  }
};

}  // namespace

const Operator& causal_attention() {
  static const CausalAttention kOperator;
  return kOperator;
}

}  // namespace everlong::softmax
