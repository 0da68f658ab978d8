// The float64 reference behind the operator: one problem a sequence.
#include <ATen/ATen.h>

#include <algorithm>

#include "mechanisms/infini/op_call.h"
#include "ops/reference_call.h"

namespace everlong::infini {
namespace {

using Vector = std::vector<double>;

at::Tensor tokens_of(const at::Tensor& x, const Params& p, std::int64_t n) {
  return p.cu_seqlens.empty() ? x.narrow(0, n, 1) : x.narrow(1, p.cu_seqlens[n], p.length(n));
}

// Open rows of sequence n, then its new ones.
at::Tensor rows_of(const at::Tensor& fresh, const TensorMap& state, const char* name,
                   const Params& p, std::int64_t n) {
  const at::Tensor mine = tokens_of(fresh, p, n);
  if (p.open(n) == 0) return mine;
  return at::cat({state.at(name).narrow(0, n, 1).narrow(1, 0, p.open(n)), mine}, 1);
}

// g for every head and channel, and the sums that bring its gradient back to beta.
Vector gates(const OpCall& call, const Params& p) {
  const std::int64_t count = p.heads * p.value_dim;
  if (!call.inputs.contains("beta")) return Vector(static_cast<std::size_t>(count), 1);
  const Vector beta = to_doubles(call.inputs.at("beta"));
  const auto share = count / static_cast<std::int64_t>(beta.size());
  Vector out;
  for (std::int64_t i = 0; i < count; ++i) {
    const double b = beta[static_cast<std::size_t>(i / share)];
    out.push_back(p.options.gate == Gate::kHardSigmoid ? std::clamp(b / 6 + 0.5, 0.0, 1.0)
                                                       : 1 / (1 + std::exp(-b)));
  }
  return out;
}
at::Tensor beta_gradient(const Vector& gate, const Vector& gate_gradient, const at::Tensor& beta,
                         Gate kind) {
  Vector out(static_cast<std::size_t>(beta.numel()));
  const auto share = gate.size() / out.size();
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double g = gate[i];
    const double slope = kind == Gate::kHardSigmoid ? (g > 0 && g < 1 ? 1.0 / 6 : 0) : g * (1 - g);
    out[i / share] += gate_gradient[i] * slope;
  }
  return from_doubles(out, beta.sizes());
}

}  // namespace

Result<OpResult> run_reference(Reference form, const OpCall& call, const Params& p) {
  const bool wanted = !call.grad_out.empty(), memory_only = !call.inputs.contains("beta");
  const std::string out_name = memory_only ? "mem" : "o";
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  const at::Tensor weight = call.inputs.contains("write_weight")
                                ? call.inputs.at("write_weight")
                                : at::ones({p.batch, p.tokens}, q.options());
  const std::int64_t N = p.sequences(), G = p.kv_heads, K = p.key_dim, V = p.value_dim;
  std::int64_t open = 0;
  for (std::int64_t n = 0; n < N; ++n) open = std::max(open, p.open_after(n));
  OpResult result;
  result.out[out_name] = at::zeros({p.batch, p.tokens, p.heads, V}, q.options());
  result.state = {{"M", at::zeros({N, G, K, V}, q.options())},
                  {"z", at::zeros({N, G, K}, q.options())},
                  {"k", at::zeros({N, open, G, K}, q.options())},
                  {"v", at::zeros({N, open, G, V}, q.options())},
                  {"weight", at::zeros({N, open}, q.options())}};
  const auto incoming = [&](const std::string& name, const at::Tensor& like) {
    return incoming_gradient(call, name, like.sizes(), "infini");
  };
  if (wanted) {
    for (const char* name : {"q", "k", "v"})
      result.grad[name] = at::zeros_like(call.inputs.at(name), at::MemoryFormat::Contiguous);
    for (const auto& [name, x] : call.state)
      if (x.is_floating_point() && name != "weight")
        result.grad["state." + name] = at::zeros_like(x, at::MemoryFormat::Contiguous);
  }
  Vector gate_gradient(static_cast<std::size_t>(p.heads * V));
  std::vector<std::int64_t> positions;
  for (std::int64_t n = 0; n < N; ++n) {
    reference::Problem problem;
    problem.tokens = p.length(n);
    problem.open = p.open(n);
    problem.heads = p.heads;
    problem.kv_heads = G;
    problem.key_dim = K;
    problem.value_dim = V;
    problem.options = p.options;
    problem.first_segment = p.position(n) / p.options.segment;
    problem.q = to_doubles(tokens_of(q, p, n));
    problem.k = to_doubles(rows_of(k, call.state, "k", p, n));
    problem.v = to_doubles(rows_of(v, call.state, "v", p, n));
    problem.weight = to_doubles(rows_of(weight, call.state, "weight", p, n));
    problem.gate = gates(call, p);
    const auto memory = [&](const char* name, std::int64_t count) {
      return call.state.empty() ? Vector(static_cast<std::size_t>(count))
                                : to_doubles(call.state.at(name)[n]);
    };
    problem.M = memory("M", G * K * V);
    problem.z = memory("z", G * K);
    const reference::Answer answer = form(problem);
    const std::int64_t T = problem.tokens, rows = problem.rows(), kept = p.open_after(n),
                       past = problem.open;
    tokens_of(result.out[out_name], p, n).copy_(from_doubles(answer.out, {1, T, p.heads, V}));
    result.state["M"][n].copy_(from_doubles(answer.M, {G, K, V}));
    result.state["z"][n].copy_(from_doubles(answer.z, {G, K}));
    const auto keep = [&](const char* name, const at::Tensor& fresh) {
      const at::Tensor all = rows_of(fresh, call.state, name, p, n);
      result.state[name].narrow(0, n, 1).narrow(1, 0, kept).copy_(all.narrow(1, rows - kept, kept));
    };
    keep("k", k);
    keep("v", v);
    keep("weight", weight);
    positions.push_back(p.position_after(n));
    if (!wanted) continue;

    EVERLONG_ASSIGN(const Vector go_all, incoming(out_name, result.out[out_name]));
    EVERLONG_ASSIGN(const Vector gM_all, incoming("state.M", result.state["M"]));
    EVERLONG_ASSIGN(const Vector gz_all, incoming("state.z", result.state["z"]));
    Vector go, gM, gz;
    if (!go_all.empty())
      go = to_doubles(tokens_of(from_doubles(go_all, result.out[out_name].sizes()), p, n));
    if (!gM_all.empty())
      gM.assign(gM_all.begin() + n * G * K * V, gM_all.begin() + (n + 1) * G * K * V);
    if (!gz_all.empty()) gz.assign(gz_all.begin() + n * G * K, gz_all.begin() + (n + 1) * G * K);
    const reference::Gradients d = reference::gradients(problem, go, gM, gz);
    tokens_of(result.grad["q"], p, n).copy_(from_doubles(d.q, {1, T, p.heads, K}));
    for (std::size_t i = 0; i < gate_gradient.size(); ++i) gate_gradient[i] += d.gate[i];
    // A row that stays open is handed on as it is: its gradient comes back to it.
    for (const auto& [name, numbers, width] :
         {std::tuple{"k", &d.k, K}, std::tuple{"v", &d.v, V}}) {
      const at::Tensor all = from_doubles(*numbers, {1, rows, G, width});
      EVERLONG_ASSIGN(const Vector back, incoming(cat("state.", name), result.state[name]));
      if (!back.empty())
        all.narrow(1, rows - kept, kept)
            .add_(
                from_doubles(back, result.state[name].sizes()).narrow(0, n, 1).narrow(1, 0, kept));
      tokens_of(result.grad[name], p, n).copy_(all.narrow(1, past, T));
      if (past > 0)
        result.grad[cat("state.", name)]
            .narrow(0, n, 1)
            .narrow(1, 0, past)
            .copy_(all.narrow(1, 0, past));
    }
    if (call.state.empty()) continue;
    result.grad["state.M"][n].copy_(from_doubles(d.M, {G, K, V}));
    result.grad["state.z"][n].copy_(from_doubles(d.z, {G, K}));
  }
  if (wanted && !memory_only)
    result.grad["beta"] =
        beta_gradient(gates(call, p), gate_gradient, call.inputs.at("beta"), p.options.gate);
  result.state["position"] = at::tensor(positions, at::kLong);
  return result;
}

}  // namespace everlong::infini
