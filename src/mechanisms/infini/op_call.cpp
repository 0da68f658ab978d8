#include "mechanisms/infini/op_call.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "core/settings.h"
#include "kernels/attention_shapes.h"

namespace everlong::infini {
namespace {

Status check_names(const TensorMap& given, const std::set<std::string>& needed,
                   const std::set<std::string>& allowed, const char* what) {
  for (const auto& [name, tensor] : given)
    if (!needed.contains(name) && !allowed.contains(name))
      return invalid_argument("infini: ", what, " \"", name, "\" is not known; known: ",
                              join(std::vector<std::string>(needed.begin(), needed.end()), ", "),
                              " ",
                              join(std::vector<std::string>(allowed.begin(), allowed.end()), ", "));
  for (const auto& name : needed)
    if (!given.contains(name))
      return invalid_argument("infini: ", what, " \"", name, "\" is missing");
  return {};
}

Status read_params(const OpCall& call, bool memory_only, Params& p) {
  Settings s(call.params, "infini: params");
  Options& o = p.options;
  o.segment = s.integer("segment", 64, 1, std::int64_t{1} << 30);
  o.commit_last = s.boolean("commit_last", false);
  const auto expect = [&](const char* key, bool given) {
    if (s.has(key) && s.boolean(key, given) != given)
      s.fail(invalid_argument("infini: params say ", key, " = ", !given, "; the tensors ",
                              given ? "have one" : "have none"));
  };
  expect("state_in", !call.state.empty());
  if (memory_only) {
    s.choice("empty_mem", "zero", {"zero"});
    read_common(s, o);
    o.rope = Rope::kNone;
    o.empty = Empty::kZero;
    return s.finish();
  }
  read_common(s, o);
  expect("varlen", !call.cu_seqlens.empty());
  s.choice("mem_pe", "none", {"none"});
  const std::string rope = s.choice("rope", "half", {"half", "interleaved", "none"});
  o.rope = rope == "half"          ? Rope::kHalfSplit
           : rope == "interleaved" ? Rope::kInterleaved
                                   : Rope::kNone;
  if (s.has("softmax_scale")) o.scale = s.number("softmax_scale", 1, 1e-30, 1e30);
  o.gate = s.choice("gate", "sigmoid_beta_times_memory",
                    {"sigmoid_beta_times_memory", "hard_sigmoid_beta_times_memory"})
                   .starts_with("hard")
               ? Gate::kHardSigmoid
               : Gate::kSigmoid;
  for (const auto& [key, heads] : {std::pair{"n_heads", p.heads}, {"n_kv_heads", p.kv_heads}})
    if (s.has(key) && s.integer(key, heads, 1, std::int64_t{1} << 40) != heads)
      s.fail(invalid_argument("infini: params say another ", key, " than the ", heads,
                              " of the tensors"));
  return s.finish();
}

Status check_state(const TensorMap& state, const at::Tensor& q, Params& p) {
  const bool open = state.contains("k");
  const std::set<std::string> opened = {"k", "v", "weight", "position"};
  std::set<std::string> needed = {"M", "z"};
  if (open) needed.insert(opened.begin(), opened.end());
  EVERLONG_RETURN_IF_ERROR(check_names(state, needed, {}, "state"));
  const std::int64_t N = p.sequences(),
                     P = open && state.at("k").dim() == 4 ? state.at("k").size(1) : 0;
  std::map<std::string, std::vector<std::int64_t>> shapes = {
      {"M", {N, p.kv_heads, p.key_dim, p.value_dim}}, {"z", {N, p.kv_heads, p.key_dim}}};
  if (open) {
    shapes["k"] = {N, P, p.kv_heads, p.key_dim};
    shapes["v"] = {N, P, p.kv_heads, p.value_dim};
    shapes["weight"] = {N, P};
    shapes["position"] = {N};
  }
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& [name, shape] : shapes) {
    const at::Tensor& x = state.at(name);
    const at::ScalarType dtype = name == "position" ? at::kLong : wide;
    if (x.sizes() != at::IntArrayRef(shape) || x.scalar_type() != dtype)
      return invalid_argument("infini: state ", name, " is ", x.scalar_type(), " ", x.sizes(), "; ",
                              dtype, " ", brackets(shape), " is needed");
    if (name != "position" && x.device() != q.device())
      return invalid_argument("infini: state ", name, " is on ", x.device().str(), " and q on ",
                              q.device().str(), "; one device is needed");
  }
  if (!open) {
    p.positions.assign(static_cast<std::size_t>(N), p.options.segment);
    return {};
  }
  const at::Tensor host = state.at("position").to(at::kCPU).contiguous();
  p.positions.assign(host.const_data_ptr<std::int64_t>(),
                     host.const_data_ptr<std::int64_t>() + host.numel());
  for (std::int64_t n = 0; n < N; ++n)
    if (p.positions[n] >= 0 && p.open(n) > P)
      return invalid_argument("infini: state position[", n, "] = ", p.positions[n], " has ",
                              p.open(n), " open tokens in segments of ", p.options.segment,
                              "; the state holds ", P);
  return {};
}

// Sequences [first, first + count) that lie side by side, each with `tokens` new tokens from
// `token` on, `open` open ones, at one segment number.
struct Group {
  std::int64_t first, count, token, tokens, position;
};
std::vector<Group> groups_of(const Params& p) {
  std::vector<Group> list;
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const bool packed = !p.cu_seqlens.empty();
    if (!packed && n > 0 && list.back().position == p.position(n)) {
      ++list.back().count;
    } else {
      list.push_back({n, 1, packed ? p.cu_seqlens[n] : 0, p.length(n), p.position(n)});
    }
  }
  return list;
}

at::Tensor tokens_of(const at::Tensor& x, const Params& p, const Group& g) {
  if (!x.defined()) return x;
  return p.cu_seqlens.empty() ? x.narrow(0, g.first, g.count) : x.narrow(1, g.token, g.tokens);
}

Carried carried_of(const TensorMap& state, const Params& p, const Group& g) {
  Carried c;
  c.segment_number = g.position / p.options.segment;
  if (state.empty()) return c;
  c.M_NGKV = state.at("M").narrow(0, g.first, g.count);
  c.z_NGK = state.at("z").narrow(0, g.first, g.count);
  const std::int64_t open = g.position % p.options.segment;
  if (open == 0) return c;
  const auto rows = [&](const char* name) {
    return state.at(name).narrow(0, g.first, g.count).narrow(1, 0, open);
  };
  c.k_NFGK = rows("k");
  c.v_NFGV = rows("v");
  c.weight_NF = rows("weight");
  return c;
}

at::Tensor positions_after(const Params& p) {
  std::vector<std::int64_t> after;
  for (std::int64_t n = 0; n < p.sequences(); ++n) after.push_back(p.position_after(n));
  return at::tensor(after, at::kLong);
}
std::int64_t most_open(const Params& p) {
  std::int64_t most = 0;
  for (std::int64_t n = 0; n < p.sequences(); ++n) most = std::max(most, p.open_after(n));
  return most;
}

}  // namespace

Result<Params> read_call(const OpCall& call, bool memory_only) {
  std::set<std::string> names = {"q", "k", "v"};
  if (!memory_only) names.insert("beta");
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, names, {"write_weight"}, "input"));
  const at::Tensor& q = call.inputs.at("q");
  for (const auto& [name, x] : call.inputs)
    if (!x.is_floating_point() || x.scalar_type() != q.scalar_type() || x.device() != q.device())
      return invalid_argument("infini: ", name, " is ", x.scalar_type(), " on ", x.device().str(),
                              " and q ", q.scalar_type(), " on ", q.device().str(),
                              "; one floating-point dtype and one device are needed");
  Params p;
  p.cu_seqlens = call.cu_seqlens;
  const auto shape = [&](const char* name) {
    const at::Tensor& x = call.inputs.at(name);
    return Shape(x.sizes().data(), x.sizes().size());
  };
  EVERLONG_RETURN_IF_ERROR(read_shapes(shape("q"), shape("k"), shape("v"), p));
  EVERLONG_RETURN_IF_ERROR(read_params(call, memory_only, p));
  EVERLONG_RETURN_IF_ERROR(validate(p));
  if (!call.state.empty()) EVERLONG_RETURN_IF_ERROR(check_state(call.state, q, p));
  EVERLONG_RETURN_IF_ERROR(validate(p));
  if (!memory_only) {
    const auto count = call.inputs.at("beta").numel();
    if (count != 1 && count != p.heads && count != p.heads * p.value_dim)
      return invalid_argument("infini: beta has ", count, " numbers; ", p.heads,
                              " (a head), 1 (a layer) or ", p.heads * p.value_dim,
                              " (a channel) are needed");
  }
  if (const auto found = call.inputs.find("write_weight");
      found != call.inputs.end() && found->second.sizes() != at::IntArrayRef({p.batch, p.tokens}))
    return invalid_argument("infini: write_weight is ", found->second.sizes(), "; [", p.batch, ", ",
                            p.tokens, "] is needed: batch, tokens");
  return p;
}

OpResult run_sequences(Form form, const TensorMap& inputs, const TensorMap& state,
                       const Params& p) {
  const auto given = [&](const char* name) {
    const auto found = inputs.find(name);
    return found == inputs.end() ? at::Tensor() : found->second;
  };
  const at::Tensor &q = inputs.at("q"), beta = given("beta"), weight = given("write_weight");
  const auto wide = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const std::int64_t rows = most_open(p);
  std::map<std::string, std::vector<at::Tensor>> parts;
  const auto pad = [&](const at::Tensor& x) {
    std::vector<std::int64_t> behind(static_cast<std::size_t>(2 * (x.dim() - 2)), 0);
    behind.insert(behind.end(), {0, rows - x.size(1)});
    return at::constant_pad_nd(x.to(wide.dtype().toScalarType()), behind);
  };
  for (const Group& g : groups_of(p)) {
    const Mixed mixed =
        form(tokens_of(q, p, g), tokens_of(inputs.at("k"), p, g), tokens_of(inputs.at("v"), p, g),
             beta, tokens_of(weight, p, g), carried_of(state, p, g), p.options);
    const Carried& after = mixed.after;
    parts["out"].push_back(mixed.out_BTHV);
    const std::int64_t N = g.count;
    parts["M"].push_back(after.M_NGKV.defined()
                             ? after.M_NGKV
                             : at::zeros({N, p.kv_heads, p.key_dim, p.value_dim}, wide));
    parts["z"].push_back(after.z_NGK.defined() ? after.z_NGK
                                               : at::zeros({N, p.kv_heads, p.key_dim}, wide));
    parts["k"].push_back(pad(after.k_NFGK));
    parts["v"].push_back(pad(after.v_NFGV));
    parts["weight"].push_back(
        pad(after.weight_NF.defined() ? after.weight_NF : at::ones({N, after.open()}, wide)));
  }
  OpResult result;
  result.out[beta.defined() ? "o" : "mem"] = at::cat(parts["out"], p.cu_seqlens.empty() ? 0 : 1);
  for (const char* name : {"M", "z", "k", "v", "weight"})
    result.state[name] = at::cat(parts[name], 0);
  result.state["position"] = positions_after(p).to(q.device());
  return result;
}

}  // namespace everlong::infini
