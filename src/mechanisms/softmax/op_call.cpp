#include "mechanisms/softmax/op_call.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "core/settings.h"

namespace everlong::softmax {
namespace {

constexpr std::int64_t kLongestWindow = std::int64_t{1} << 62;

Status check_names(const TensorMap& given, const std::set<std::string>& known, const char* what) {
  for (const auto& [name, tensor] : given)
    if (!known.contains(name))
      return invalid_argument("softmax: ", what, " \"", name, "\" is not known; known: ",
                              join(std::vector<std::string>(known.begin(), known.end()), ", "));
  for (const auto& name : known)
    if (!given.contains(name))
      return invalid_argument("softmax: ", what, " \"", name, "\" is missing");
  return {};
}

// New rows of sequence n, [1, length, heads, dim].
at::Tensor tokens_of(const at::Tensor& x, const Params& p, std::int64_t n) {
  return p.cu_seqlens.empty() ? x.narrow(0, n, 1) : x.narrow(1, p.first_token(n), p.length(n));
}

// Past and new rows of sequence n, [1, past + length, G, dim].
at::Tensor rows_of(const at::Tensor& x, const TensorMap& state, const std::string& name,
                   const Params& p, std::int64_t n) {
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

at::Tensor final_lengths(const Params& p) {
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 0; n < p.sequences(); ++n) lengths.push_back(p.kept(n));
  return at::tensor(lengths, at::kLong);
}

std::span<const double> numbers(const at::Tensor& contiguous) {
  return {contiguous.const_data_ptr<double>(), static_cast<std::size_t>(contiguous.numel())};
}
at::Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef shape) {
  return at::tensor(values, at::kDouble).reshape(shape);
}

}  // namespace

Result<Params> read_call(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"q", "k", "v"}, "input"));
  if (!call.state.empty())
    EVERLONG_RETURN_IF_ERROR(check_names(call.state, {"k", "v", "length"}, "state"));
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  std::vector<std::pair<std::string, at::Tensor>> numbers = {{"q", q}, {"k", k}, {"v", v}};
  if (!call.state.empty()) {
    numbers.emplace_back("state k", call.state.at("k"));
    numbers.emplace_back("state v", call.state.at("v"));
  }
  for (const auto& [name, tensor] : numbers)
    if (!tensor.is_floating_point() || tensor.scalar_type() != q.scalar_type() ||
        tensor.device() != q.device())
      return invalid_argument("softmax: ", name, " is ", tensor.scalar_type(), " on ",
                              tensor.device().str(), " and q ", q.scalar_type(), " on ",
                              q.device().str(),
                              "; one floating-point dtype and one device are needed");

  Params params;
  params.cu_seqlens = call.cu_seqlens;
  const at::Tensor none;
  const at::Tensor& state_k = call.state.empty() ? none : call.state.at("k");
  const at::Tensor& state_v = call.state.empty() ? none : call.state.at("v");
  const auto shape = [](const at::Tensor& t) {
    return t.defined() ? Shape(t.sizes().data(), t.sizes().size()) : Shape();
  };
  EVERLONG_RETURN_IF_ERROR(
      read_shapes(shape(q), shape(k), shape(v), shape(state_k), shape(state_v), params));
  if (!call.state.empty()) {
    const at::Tensor& length = call.state.at("length");
    if (length.scalar_type() != at::kLong || length.dim() != 1)
      return invalid_argument("softmax: state length is ", length.scalar_type(), " with ",
                              length.dim(), " dimensions; int64 [", params.sequences(),
                              "] is needed");
    const at::Tensor host = length.to(at::kCPU).contiguous();
    params.state_lengths.assign(host.data_ptr<std::int64_t>(),
                                host.data_ptr<std::int64_t>() + host.numel());
    if (params.state_lengths.empty() && params.sequences() > 0)
      return invalid_argument("softmax: state length is empty for ", params.sequences(),
                              " sequences");
  }
  Settings settings(call.params, "softmax: params");
  params.scale = settings.number("scale", default_scale(std::max<std::int64_t>(params.key_dim, 1)),
                                 -1e30, 1e30);
  params.window = settings.integer("window", 0, 0, kLongestWindow);
  EVERLONG_RETURN_IF_ERROR(settings.finish());
  EVERLONG_RETURN_IF_ERROR(validate(params));
  return params;
}

OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const Params& p) {
  const at::Tensor &q = inputs.at("q"), &k = inputs.at("k"), &v = inputs.at("v");
  const Options options{p.window, p.scale};
  OpResult result;
  result.state["length"] = final_lengths(p).to(q.device());

  // Every row alike: one call, and the cache is k and v.
  if (p.cu_seqlens.empty() && p.state_lengths.empty()) {
    const std::int64_t kept = p.kept(0);
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

// Gradients by hand: a row of the final state is a row of the keys, so its incoming gradient is
// added to that row's.
OpResult run_reference(Reference form, const OpCall& call, const Params& p) {
  const auto dense = [](TensorMap map) {
    for (auto& [name, tensor] : map) tensor = tensor.detach().contiguous();
    return map;
  };
  const TensorMap inputs = dense(call.inputs), state = dense(call.state),
                  grad_out = dense(call.grad_out);
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
    reference::Problem problem{
        p.length(n),           p.past(n), p.heads, p.kv_heads, p.key_dim,
        p.value_dim,           p.window,  p.scale, numbers(q), numbers(keys.back()),
        numbers(values.back())};
    tokens_of(result.out["o"], p, n)
        .copy_(tensor_of(form(problem), {1, p.length(n), p.heads, p.value_dim}));
    if (!wanted) continue;

    TensorMap d = {{"q", at::zeros_like(q)},
                   {"k", at::zeros_like(keys.back())},
                   {"v", at::zeros_like(values.back())}};
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
        d[name]
            .narrow(1, all - kept, kept)
            .add_(carried->second.narrow(0, n, 1).narrow(1, 0, kept));
      tokens_of(result.grad[name], p, n).copy_(d[name].narrow(1, p.past(n), p.length(n)));
      if (p.past(n) > 0)
        result.grad[cat("state.", name)]
            .narrow(0, n, 1)
            .narrow(1, 0, p.past(n))
            .copy_(d[name].narrow(1, 0, p.past(n)));
    }
  }
  result.state["length"] = final_lengths(p);
  result.state["k"] = final_rows(keys, p);
  result.state["v"] = final_rows(values, p);
  return result;
}

}  // namespace everlong::softmax
