#include "mechanisms/landmark/op_call.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/reference_call.h"

namespace everlong::landmark {
namespace {

constexpr std::int64_t kMostBlock = std::int64_t{1} << 40;

// New rows of sequence n, [1, length, ..].
at::Tensor tokens_of(const at::Tensor& x, const Params& p, std::int64_t n) {
  return p.cu_seqlens.empty() ? x.narrow(0, n, 1) : x.narrow(1, p.first_token(n), p.length(n));
}

// Past and new rows of sequence n, [1, past + length, ..].
at::Tensor rows_of(const at::Tensor& fresh, const TensorMap& state, const std::string& name,
                   const Params& p, std::int64_t n) {
  if (p.past(n) == 0) return fresh;
  return at::cat({state.at(name).narrow(0, n, 1).narrow(1, 0, p.past(n)), fresh}, 1);
}

// Which of past and new keys are landmarks, [1, past + length] on the CPU.
at::Tensor marks_of(const TensorMap& inputs, const TensorMap& state, const AttentionCall& call,
                    std::int64_t n) {
  const Params& p = call.params;
  at::Tensor fresh;
  if (call.block > 0) {
    const auto marks = regular_landmarks(p.past(n), p.length(n), call.block, call.phase);
    fresh = at::tensor(at::ArrayRef<std::uint8_t>(marks), at::kByte).unsqueeze(0);
  } else {
    fresh = tokens_of(inputs.at("is_landmark"), p, n).to(at::kCPU, at::kByte);
  }
  if (p.past(n) == 0) return fresh;
  const at::Tensor past = state.at("is_landmark").narrow(0, n, 1).narrow(1, 0, p.past(n));
  return at::cat({past.to(at::kCPU, at::kByte), fresh}, 1);
}

std::int64_t longest(const Params& p) {
  std::int64_t rows = 0;
  for (std::int64_t n = 0; n < p.sequences(); ++n) rows = std::max(rows, p.past(n) + p.length(n));
  return rows;
}

// The rows of every sequence, padded with zeros to the longest.
at::Tensor final_rows(const std::vector<at::Tensor>& rows, const Params& p) {
  std::vector<at::Tensor> padded;
  for (const at::Tensor& x : rows) {
    std::vector<std::int64_t> pad(2 * static_cast<std::size_t>(x.dim() - 1), 0);
    pad.back() = longest(p) - x.size(1);
    padded.push_back(at::constant_pad_nd(x, pad));
  }
  return at::cat(padded, 0);
}

void add_lengths(TensorMap& state, const Params& p, at::Device device) {
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 0; n < p.sequences(); ++n) lengths.push_back(p.past(n) + p.length(n));
  state["length"] = at::tensor(lengths, at::kLong).to(device);
}

Status read_state(const OpCall& call, Params& p) {
  const at::Tensor& length = call.state.at("length");
  if (length.scalar_type() != at::kLong || length.dim() != 1)
    return invalid_argument("landmark: state length is ", length.scalar_type(), " with ",
                            length.dim(), " dimensions; int64 [", p.sequences(), "] is needed");
  const at::Tensor host = length.to(at::kCPU).contiguous();
  p.state_lengths.assign(host.const_data_ptr<std::int64_t>(),
                         host.const_data_ptr<std::int64_t>() + host.numel());
  if (p.state_lengths.empty() && p.sequences() > 0)
    return invalid_argument("landmark: state length is empty for ", p.sequences(), " sequences");
  return check_marks("state is_landmark", call.state.at("is_landmark"),
                     {p.sequences(), p.state_capacity});
}

}  // namespace

Status check_names(const TensorMap& given, const std::set<std::string>& needed,
                   const std::set<std::string>& optional, const char* what) {
  for (const auto& [name, tensor] : given)
    if (!needed.contains(name) && !optional.contains(name)) {
      std::vector<std::string> known(needed.begin(), needed.end());
      known.insert(known.end(), optional.begin(), optional.end());
      return invalid_argument("landmark: ", what, " \"", name,
                              "\" is not known; known: ", join(known, ", "));
    }
  for (const auto& name : needed)
    if (!given.contains(name))
      return invalid_argument("landmark: ", what, " \"", name, "\" is missing");
  return {};
}

Status check_numbers(const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  const auto& [first, q] = tensors.front();
  for (const auto& [name, tensor] : tensors)
    if (!tensor.is_floating_point() || tensor.scalar_type() != q.scalar_type() ||
        tensor.device() != q.device())
      return invalid_argument("landmark: ", name, " is ", tensor.scalar_type(), " on ",
                              tensor.device().str(), " and ", first, " ", q.scalar_type(), " on ",
                              q.device().str(),
                              "; one floating-point dtype and one device are needed");
  return {};
}

Status check_marks(const std::string& name, const at::Tensor& marks, at::IntArrayRef shape) {
  if (marks.sizes() == shape &&
      (marks.scalar_type() == at::kByte || marks.scalar_type() == at::kBool))
    return {};
  return invalid_argument("landmark: ", name, " is ", marks.scalar_type(), " ", marks.sizes(),
                          "; bool or uint8 ", shape, " is needed");
}

bool read_drop_empty(Settings& settings) {
  return settings.choice("empty_block", "keep", {"keep", "drop"}) == "drop";
}

Result<AttentionCall> read_call(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"q", "k", "v"}, {"is_landmark"}, "input"));
  if (!call.state.empty())
    EVERLONG_RETURN_IF_ERROR(
        check_names(call.state, {"k", "v", "is_landmark", "length"}, {}, "state"));
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  std::vector<std::pair<std::string, at::Tensor>> numbers = {{"q", q}, {"k", k}, {"v", v}};
  at::Tensor state_k, state_v;
  if (!call.state.empty()) {
    numbers.emplace_back("state k", state_k = call.state.at("k"));
    numbers.emplace_back("state v", state_v = call.state.at("v"));
  }
  EVERLONG_RETURN_IF_ERROR(check_numbers(numbers));

  AttentionCall about;
  Params& params = about.params;
  params.cu_seqlens = call.cu_seqlens;
  const auto shape = [](const at::Tensor& t) {
    return t.defined() ? Shape(t.sizes().data(), t.sizes().size()) : Shape();
  };
  EVERLONG_RETURN_IF_ERROR(
      read_shapes(shape(q), shape(k), shape(v), shape(state_k), shape(state_v), params));
  if (!call.state.empty()) EVERLONG_RETURN_IF_ERROR(read_state(call, params));
  const bool named = call.inputs.contains("is_landmark");
  if (named)
    EVERLONG_RETURN_IF_ERROR(
        check_marks("is_landmark", call.inputs.at("is_landmark"), {params.batch, params.tokens}));

  Settings s(call.params, "landmark: params");
  params.scale =
      s.number("scale", default_scale(std::max<std::int64_t>(params.key_dim, 1)), -1e30, 1e30);
  params.drop_empty = read_drop_empty(s);
  about.block = s.integer("block", 0, 2, kMostBlock);
  about.phase = s.integer("phase", 0, 0, kMostBlock);
  if (named == s.has("block"))
    s.fail(invalid_argument("landmark: where the landmarks are is said ",
                            named ? "twice" : "nowhere",
                            "; give the input is_landmark, or the parameter block"));
  if (!s.boolean("causal", true))
    s.fail(unsupported("landmark: causal = false; a token sees the past alone"));
  s.choice("rope", "none", {"none"});
  if (s.integer("heads", params.heads, 1, kMostBlock) != params.heads ||
      s.integer("heads_kv", params.kv_heads, 1, kMostBlock) != params.kv_heads)
    s.fail(invalid_argument("landmark: heads and heads_kv are not those of q and k (", params.heads,
                            ", ", params.kv_heads, ")"));
  s.raw("seed");
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(params));
  return about;
}

OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const AttentionCall& call) {
  const Params& p = call.params;
  const at::Tensor &q = inputs.at("q"), &k = inputs.at("k"), &v = inputs.at("v");
  const Options options{p.scale, p.drop_empty};
  std::vector<at::Tensor> outputs, keys, values, marks;
  for (std::int64_t n = 0; n < p.sequences(); ++n)
    marks.push_back(marks_of(inputs, state, call, n));
  OpResult result;
  add_lengths(result.state, p, q.device());
  if (p.cu_seqlens.empty() && p.state_lengths.empty()) {  // every row alike: one call
    const at::Tensor all = at::cat(marks, 0);
    result.out["o"] = attend(q, k, v, all, options);
    result.state["k"] = k.clone();
    result.state["v"] = v.clone();
    result.state["is_landmark"] = all.to(q.device());
    return result;
  }
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    keys.push_back(rows_of(tokens_of(k, p, n), state, "k", p, n));
    values.push_back(rows_of(tokens_of(v, p, n), state, "v", p, n));
    outputs.push_back(attend(tokens_of(q, p, n), keys.back(), values.back(),
                             marks[static_cast<std::size_t>(n)], options));
  }
  result.out["o"] = at::cat(outputs, p.cu_seqlens.empty() ? 0 : 1);
  result.state["k"] = final_rows(keys, p);
  result.state["v"] = final_rows(values, p);
  result.state["is_landmark"] = final_rows(marks, p).to(q.device());
  return result;
}

// Gradients by hand: a row of the final state is a row of the keys, so its incoming gradient is
// added to that row's.
OpResult run_reference(Reference form, const OpCall& call, const AttentionCall& about) {
  const Params& p = about.params;
  const bool wanted = !call.grad_out.empty();
  const TensorMap& inputs = call.inputs;
  OpResult result;
  result.out["o"] = at::zeros({p.batch, p.tokens, p.heads, p.value_dim}, inputs.at("q").options());
  if (wanted) {
    for (const char* name : {"q", "k", "v"}) result.grad[name] = at::zeros_like(inputs.at(name));
    for (const char* name : {"k", "v"})
      if (call.state.contains(name))
        result.grad[cat("state.", name)] = at::zeros_like(call.state.at(name));
  }
  std::vector<at::Tensor> keys, values, marks;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const auto q = to_doubles(tokens_of(inputs.at("q"), p, n));
    keys.push_back(rows_of(tokens_of(inputs.at("k"), p, n), call.state, "k", p, n));
    values.push_back(rows_of(tokens_of(inputs.at("v"), p, n), call.state, "v", p, n));
    marks.push_back(marks_of(inputs, call.state, about, n).contiguous());
    const auto k = to_doubles(keys.back()), v = to_doubles(values.back());
    const reference::Problem problem{p.length(n),
                                     p.past(n),
                                     p.heads,
                                     p.kv_heads,
                                     p.key_dim,
                                     p.value_dim,
                                     p.scale,
                                     p.drop_empty,
                                     q,
                                     k,
                                     v,
                                     {marks.back().const_data_ptr<std::uint8_t>(),
                                      static_cast<std::size_t>(marks.back().numel())}};
    tokens_of(result.out["o"], p, n)
        .copy_(from_doubles(form(problem), {1, p.length(n), p.heads, p.value_dim}));
    if (!wanted) continue;

    TensorMap d = {{"q", at::zeros_like(tokens_of(inputs.at("q"), p, n))},
                   {"k", at::zeros_like(keys.back())},
                   {"v", at::zeros_like(values.back())}};
    if (const auto go = call.grad_out.find("o"); go != call.grad_out.end()) {
      const auto by_hand = reference::gradients(problem, to_doubles(tokens_of(go->second, p, n)));
      for (const auto& [name, values_of] :
           {std::pair{"q", &by_hand.q}, {"k", &by_hand.k}, {"v", &by_hand.v}})
        d[name].copy_(from_doubles(*values_of, d[name].sizes()));
    }
    tokens_of(result.grad["q"], p, n).copy_(d["q"]);
    for (const char* name : {"k", "v"}) {
      const std::int64_t all = d[name].size(1);
      if (const auto carried = call.grad_out.find(cat("state.", name));
          carried != call.grad_out.end())
        d[name].add_(carried->second.narrow(0, n, 1).narrow(1, 0, all));
      tokens_of(result.grad[name], p, n).copy_(d[name].narrow(1, p.past(n), p.length(n)));
      if (p.past(n) > 0)
        result.grad[cat("state.", name)]
            .narrow(0, n, 1)
            .narrow(1, 0, p.past(n))
            .copy_(d[name].narrow(1, 0, p.past(n)));
    }
  }
  add_lengths(result.state, p, at::kCPU);
  result.state["k"] = final_rows(keys, p);
  result.state["v"] = final_rows(values, p);
  result.state["is_landmark"] = final_rows(marks, p);
  return result;
}

}  // namespace everlong::landmark
