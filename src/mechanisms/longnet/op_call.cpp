#include "mechanisms/longnet/op_call.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "core/settings.h"
#include "ops/reference_call.h"

namespace everlong::longnet {
namespace {

Status check_names(const TensorMap& given, const std::set<std::string>& known, const char* what) {
  for (const auto& [name, tensor] : given)
    if (!known.contains(name))
      return invalid_argument("longnet: ", what, " \"", name, "\" is not known; known: ",
                              join(std::vector<std::string>(known.begin(), known.end()), ", "));
  for (const auto& name : known)
    if (!given.contains(name))
      return invalid_argument("longnet: ", what, " \"", name, "\" is missing");
  return {};
}

Result<std::vector<std::int64_t>> read_list(Settings& settings, const char* key) {
  const nlohmann::json given = settings.raw(key);
  const bool fits = given.is_array() &&
                    std::ranges::all_of(given, [](const auto& x) { return x.is_number_integer(); });
  if (!fits)
    return invalid_argument("longnet: params ", key, " = ", given.dump(),
                            "; a list of integers is needed");
  return given.get<std::vector<std::int64_t>>();
}

Result<std::vector<std::vector<std::int64_t>>> read_table(Settings& settings, const char* key) {
  std::vector<std::vector<std::int64_t>> table;
  const nlohmann::json given = settings.raw(key);
  if (given.is_null()) return table;
  const auto is_list = [](const nlohmann::json& row) {
    return row.is_array() &&
           std::ranges::all_of(row, [](const auto& x) { return x.is_number_integer(); });
  };
  if (!given.is_array() || !std::ranges::all_of(given, is_list))
    return invalid_argument("longnet: params ", key, " = ", given.dump(),
                            "; a list of lists of integers is needed, [patterns][heads]");
  return given.get<std::vector<std::vector<std::int64_t>>>();
}

std::string buffer_name(const char* what, std::size_t pattern) { return cat(what, pattern); }

Status read_state(const OpCall& call, Params& p) {
  std::set<std::string> names = {"position"};
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
    names.insert(buffer_name("k", i));
    names.insert(buffer_name("v", i));
  }
  EVERLONG_RETURN_IF_ERROR(check_names(call.state, names, "state"));
  const at::Tensor& q = call.inputs.at("q");
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i)
    for (const auto& [what, dim] : {std::pair("k", p.key_dim), {"v", p.value_dim}}) {
      const std::string name = buffer_name(what, i);
      const at::Tensor& x = call.state.at(name);
      if (x.scalar_type() != q.scalar_type() || x.device() != q.device())
        return invalid_argument("longnet: state ", name, " is ", x.scalar_type(), " on ",
                                x.device().str(), " and q ", q.scalar_type(), " on ",
                                q.device().str(), "; one dtype and one device are needed");
      const std::int64_t rows = p.geometry.patterns[i].rows();
      if (x.sizes() != at::IntArrayRef({p.sequences(), p.kv_heads, rows, dim}))
        return invalid_argument("longnet: state ", name, " has shape ", x.sizes(), "; [",
                                p.sequences(), ", ", p.kv_heads, ", ", rows, ", ", dim,
                                "] is needed: sequences, heads, rows of the pattern, dim");
    }
  const at::Tensor& position = call.state.at("position");
  if (position.scalar_type() != at::kLong || position.dim() != 1 ||
      position.size(0) != p.sequences())
    return invalid_argument("longnet: state position is ", position.scalar_type(), " ",
                            position.sizes(), "; int64 [", p.sequences(), "] is needed");
  const at::Tensor host = position.to(at::kCPU).contiguous();
  p.positions.assign(host.const_data_ptr<std::int64_t>(),
                     host.const_data_ptr<std::int64_t>() + host.numel());
  return {};
}

// New rows of sequence n, [1, length, heads, dim].
at::Tensor tokens_of(const at::Tensor& x, const Params& p, std::int64_t n) {
  return p.cu_seqlens.empty() ? x.narrow(0, n, 1) : x.narrow(1, p.first_token(n), p.length(n));
}

std::vector<std::int64_t> capacities(const Params& p) {
  std::vector<std::int64_t> rows;
  for (const Pattern& pattern : p.geometry.patterns) rows.push_back(pattern.rows());
  return rows;
}

// Sequences [first, first + count) of the state.
Past past_of(const TensorMap& state, const Params& p, std::int64_t first, std::int64_t count) {
  if (state.empty()) return {};
  Past past;
  past.position = p.past(first);
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
    past.k.push_back(state.at(buffer_name("k", i)).narrow(0, first, count));
    past.v.push_back(state.at(buffer_name("v", i)).narrow(0, first, count));
  }
  return past;
}

void set_state(OpResult& result, const std::vector<Past>& carried, const Params& p,
               at::Device device) {
  std::vector<std::int64_t> positions;
  for (std::int64_t n = 0; n < p.sequences(); ++n) positions.push_back(p.past(n) + p.length(n));
  result.state["position"] = at::tensor(positions, at::kLong).to(device);
  for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
    std::vector<at::Tensor> k, v;
    for (const Past& past : carried) {
      k.push_back(past.k[i]);
      v.push_back(past.v[i]);
    }
    result.state[buffer_name("k", i)] = at::cat(k, 0);
    result.state[buffer_name("v", i)] = at::cat(v, 0);
  }
}

Options options_of(const Params& p) {
  return {.geometry = p.geometry, .scale = p.scale, .path = Path::kComposite};
}

}  // namespace

Result<Params> read_call(const OpCall& call, DecodeParams* decode) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"q", "k", "v"}, "input"));
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  for (const auto& [name, tensor] : call.inputs)
    if (!tensor.is_floating_point() || tensor.scalar_type() != q.scalar_type() ||
        tensor.device() != q.device())
      return invalid_argument("longnet: ", name, " is ", tensor.scalar_type(), " on ",
                              tensor.device().str(), " and q ", q.scalar_type(), " on ",
                              q.device().str(),
                              "; one floating-point dtype and one device are needed");
  Params p;
  p.cu_seqlens = call.cu_seqlens;
  const auto shape = [](const at::Tensor& t) { return Shape(t.sizes().data(), t.sizes().size()); };
  EVERLONG_RETURN_IF_ERROR(read_shapes(shape(q), shape(k), shape(v), p));

  Settings s(call.params, "longnet: params");
  EVERLONG_ASSIGN(const auto segments, read_list(s, "segment_length"));
  EVERLONG_ASSIGN(const auto ratios, read_list(s, "dilated_ratio"));
  EVERLONG_ASSIGN(p.geometry.patterns, make_patterns(segments, ratios));
  p.scale = s.number("scale", default_scale(std::max<std::int64_t>(p.key_dim, 1)), -1e30, 1e30);
  EVERLONG_ASSIGN(p.geometry.offset_rule,
                  offset_rule_of(s.choice("offset_rule", "mod", {"mod", "block"})));
  EVERLONG_ASSIGN(p.geometry.beyond, beyond_of(s.choice("beyond", "fixed", {"fixed", "grow"})));
  p.geometry.causal = s.boolean("causal", true);
  // Causal padding lies behind every query, so both names mean the same there.
  p.geometry.phantom =
      s.choice("pad", "exact", {"exact", "phantom"}) == "phantom" && !p.geometry.causal;
  p.geometry.detached = s.choice("mixing_grad", "joint", {"joint", "detached"}) == "detached";
  (void)s.choice("alignment", "segment_start", {"segment_start"});
  (void)s.raw("seed");  // of whoever drew the case
  if (decode != nullptr) {
    decode->prefill = s.integer("prefill", 0, 0, p.tokens);
    (void)s.integer("steps", p.tokens - decode->prefill, p.tokens - decode->prefill,
                    p.tokens - decode->prefill);
    EVERLONG_ASSIGN(decode->state_rows, read_table(s, "state_rows"));
  }
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(p));  // read_state asks for p.sequences()
  if (!call.state.empty()) EVERLONG_RETURN_IF_ERROR(read_state(call, p));
  EVERLONG_RETURN_IF_ERROR(validate(p));
  return p;
}

OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const Params& p) {
  const at::Tensor &q = inputs.at("q"), &k = inputs.at("k"), &v = inputs.at("v");
  const Options options = options_of(p);
  const auto capacity = capacities(p);
  const bool together =
      p.cu_seqlens.empty() && std::ranges::all_of(p.positions, [&](std::int64_t position) {
        return position == p.positions.front();
      });
  OpResult result;
  std::vector<at::Tensor> outputs;
  std::vector<Past> carried;
  const auto take = [&](const Past& past, const at::Tensor& a, const at::Tensor& b,
                        const at::Tensor& c) {
    outputs.push_back(attend(a, b, c, options, past));
    if (p.geometry.causal) carried.push_back(advanced(past, b, c, p.geometry, capacity));
  };
  if (together) {
    take(past_of(state, p, 0, p.sequences()), q, k, v);
  } else {
    for (std::int64_t n = 0; n < p.sequences(); ++n)
      take(past_of(state, p, n, 1), tokens_of(q, p, n), tokens_of(k, p, n), tokens_of(v, p, n));
  }
  result.out["o"] = at::cat(outputs, p.cu_seqlens.empty() ? 0 : 1);
  if (p.geometry.causal) set_state(result, carried, p, q.device());
  return result;
}

OpResult run_reference(Reference form, const OpCall& call, const Params& p) {
  OpResult result;
  const bool wanted = !call.grad_out.empty();
  const auto options = call.inputs.at("q").options();
  result.out["o"] = at::zeros({p.batch, p.tokens, p.heads, p.value_dim}, options);
  if (wanted) {
    for (const auto& [name, x] : call.inputs) result.grad[name] = at::zeros(x.sizes(), options);
    for (const auto& [name, x] : call.state)
      if (x.is_floating_point()) result.grad["state." + name] = at::zeros(x.sizes(), options);
  }
  std::vector<Past> carried;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const auto numbers = [&](const char* name) {
      return to_doubles(tokens_of(call.inputs.at(name), p, n));
    };
    const auto q = numbers("q"), k = numbers("k"), v = numbers("v");
    reference::Problem problem{p.length(n), p.past(n),  p.heads, p.kv_heads, p.key_dim, p.value_dim,
                               p.scale,     p.geometry, q,       k,          v,         {}};
    const Past past = past_of(call.state, p, n, 1);
    for (std::size_t i = 0; i < past.k.size(); ++i) {
      problem.past.k.push_back(to_doubles(past.k[i]));
      problem.past.v.push_back(to_doubles(past.v[i]));
    }
    const std::int64_t T = p.length(n), G = p.kv_heads;
    tokens_of(result.out["o"], p, n)
        .copy_(from_doubles(form(problem), {1, T, p.heads, p.value_dim}));
    const auto tensors = [&](const reference::Buffers& buffers) {
      Past made;
      for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
        const std::int64_t rows = p.geometry.patterns[i].rows();
        made.k.push_back(from_doubles(buffers.k[i], {1, G, rows, p.key_dim}));
        made.v.push_back(from_doubles(buffers.v[i], {1, G, rows, p.value_dim}));
      }
      return made;
    };
    if (p.geometry.causal) carried.push_back(tensors(reference::final_buffers(problem)));
    if (!wanted) continue;

    at::Tensor go = at::zeros({1, T, p.heads, p.value_dim}, options);
    if (call.grad_out.contains("o")) go = tokens_of(call.grad_out.at("o"), p, n);
    const auto d = reference::gradients(problem, to_doubles(go));
    tokens_of(result.grad["q"], p, n).copy_(from_doubles(d.q, {1, T, p.heads, p.key_dim}));
    tokens_of(result.grad["k"], p, n).copy_(from_doubles(d.k, {1, T, G, p.key_dim}));
    tokens_of(result.grad["v"], p, n).copy_(from_doubles(d.v, {1, T, G, p.value_dim}));
    const Past by_past = tensors(d.past);
    const std::int64_t end = p.past(n) + T;
    for (std::size_t i = 0; i < p.geometry.patterns.size(); ++i) {
      const auto [w, r] = p.geometry.patterns[i];
      for (const auto& [what, of_past] : {std::pair("k", by_past.k[i]), {"v", by_past.v[i]}}) {
        const std::string name = buffer_name(what, i);
        at::Tensor to_past, none;
        if (!call.state.empty()) {
          to_past = result.grad["state." + name].narrow(0, n, 1);
          to_past.copy_(of_past);
        }
        // A row of the final buffer is a row of the initial one or a token of the call.
        const auto carried_grad = call.grad_out.find("state." + name);
        if (carried_grad == call.grad_out.end()) continue;
        const at::Tensor to_tokens = tokens_of(result.grad[what], p, n);
        const std::int64_t start = end > 0 ? (end - 1) / w * w : 0;
        for (std::int64_t g = 0; g < G; ++g) {
          const std::int64_t offset = offset_of(p.geometry.offset_rule, g, G, r);
          for (std::int64_t l = 0; l < rows_held(p.geometry.patterns[i], offset, end); ++l) {
            const std::int64_t token = start + offset + l * r - p.past(n);
            const at::Tensor row = carried_grad->second[n][g][l];
            if (token >= 0)
              to_tokens[0][token][g].add_(row);
            else
              to_past[0][g][l].add_(row);
          }
        }
      }
    }
  }
  if (p.geometry.causal) set_state(result, carried, p, at::kCPU);
  return result;
}

}  // namespace everlong::longnet
