#include "eval/op_gate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace everlong {
namespace {

constexpr std::int64_t kGateTokens = 1024;
constexpr std::int64_t kPieceTokens = 4096;
// What the last tokens of a long case may cost in float64: a few seconds of one device.
constexpr double kBearableFlopsCpu = 2e11, kBearableFlopsCuda = 2e13;

// Largest error over largest value. Sums of a thousand products in another order, gradients summed
// over a case: fp32 stays near 1e-6, bf16 rounds each result to 2^-9 and inner products of rounded
// values once more.
double allowed_error(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-10;
    case at::kFloat:
      return 1e-4;
    default:
      return 4e-2;
  }
}

// Collects tensors that belong together, then judges each by its own largest value. Where that is a
// hundredth of the group's largest or less, by that hundredth: softmax over one token has the
// gradient zero, and its rounding is no error.
class Comparison {
 public:
  explicit Comparison(OpGate& gate) : gate_(gate) {}

  void add(const std::string& name, const at::Tensor& given, const at::Tensor& wanted) {
    if (wanted.numel() == 0) return;
    const at::Tensor a = given.to(at::kCPU, at::kDouble), b = wanted.to(at::kCPU, at::kDouble);
    found_.push_back({name, (a - b).abs().max().item<double>(), b.abs().max().item<double>()});
  }

  void judge() {
    double largest = 1e-30;
    for (const auto& found : found_) largest = std::max(largest, found.scale);
    for (const auto& found : found_) {
      const double error = found.difference / std::max(found.scale, 0.01 * largest);
      if (std::isnan(gate_.max_rel_error) || error <= gate_.max_rel_error) continue;
      gate_.max_rel_error = error;
      gate_.worst = found.name;
    }
    found_.clear();
  }

 private:
  struct Found {
    std::string name;
    double difference, scale;
  };
  OpGate& gate_;
  std::vector<Found> found_;
};

at::Tensor to_double(const at::Tensor& tensor) {
  return tensor.is_floating_point() ? tensor.to(at::kDouble) : tensor;
}

TensorMap to_double(const TensorMap& tensors) {
  TensorMap out;
  for (const auto& [name, tensor] : tensors) out[name] = to_double(tensor);
  return out;
}

// The very numbers that the form gets, in float64: only what it computes is judged, not how its
// inputs were rounded.
OpCall widened(const Operator& op, const OpCall& call, at::Device device) {
  return cast_call(op, call, at::kDouble, device);
}

// Incoming gradients that are zero outside [begin, end).
OpCall only_from(const OpCall& call, std::int64_t begin, std::int64_t end) {
  OpCall out = call;
  for (auto& [name, gradient] : out.grad_out) {
    at::Tensor kept = at::zeros_like(gradient);
    if (!name.starts_with("state."))
      kept.narrow(1, begin, end - begin).copy_(gradient.narrow(1, begin, end - begin));
    gradient = kept;
  }
  return out;
}

}  // namespace

OpCall cast_call(const Operator& op, const OpCall& call, at::ScalarType dtype, at::Device device) {
  OpCall out = call;
  const auto kept = op.host_inputs();
  for (auto& [name, tensor] : out.inputs) {
    if (std::ranges::find(kept, name) != kept.end()) continue;
    tensor = tensor.is_floating_point() ? tensor.to(device, dtype) : tensor.to(device);
  }
  const auto state_dtype = op.state_dtype(dtype);
  for (auto& [name, tensor] : out.state)
    tensor = tensor.is_floating_point() ? tensor.to(device, state_dtype) : tensor.to(device);
  for (auto& [name, tensor] : out.grad_out)
    tensor = tensor.to(device, name.starts_with("state.") ? state_dtype : dtype);
  return out;
}

OpCall slice_call(const Operator& op, const OpCall& call, std::int64_t begin, std::int64_t end,
                  const TensorMap& state) {
  OpCall out = call;
  for (const auto& name : op.token_inputs()) {
    const auto found = out.inputs.find(name);
    if (found != out.inputs.end()) found->second = found->second.narrow(1, begin, end - begin);
  }
  for (auto& [name, gradient] : out.grad_out)
    if (!name.starts_with("state.")) gradient = gradient.narrow(1, begin, end - begin);
  out.state = state;
  return out;
}

Result<TensorMap> state_after(const Operator& op, std::string_view form, const OpCall& call,
                              std::int64_t tokens, at::ScalarType dtype) {
  const at::Device device = call.inputs.at(op.token_inputs().front()).device();
  TensorMap state = call.state;
  OpCall plain = call;
  plain.grad_out.clear();
  for (std::int64_t begin = 0; begin < tokens; begin += kPieceTokens) {
    const std::int64_t end = std::min(begin + kPieceTokens, tokens);
    const OpCall piece = cast_call(op, slice_call(op, plain, begin, end, state), dtype, device);
    EVERLONG_ASSIGN(auto result, op.run(form, piece));
    state = std::move(result.state);
  }
  return state;
}

Result<OpGate> check_op(const Operator& op, std::string_view form, const OpCall& call,
                        std::int64_t tokens, at::ScalarType dtype, double flops) {
  OpGate gate;
  gate.allowed = allowed_error(dtype);
  Comparison comparison(gate);
  const auto names = op.token_inputs();
  const bool gradients = !call.grad_out.empty();

  if (tokens <= kGateTokens) {
    gate.against = cat("reference, all ", tokens, " tokens");
    EVERLONG_ASSIGN(const auto given, op.run(form, call));
    EVERLONG_ASSIGN(const auto wanted,
                    op.run(op.forms().front().name, widened(op, call, at::kCPU)));
    for (const auto& [name, tensor] : wanted.out) comparison.add(name, given.out.at(name), tensor);
    comparison.judge();
    for (const auto& [name, tensor] : wanted.state)
      comparison.add("state." + name, given.state.at(name), tensor);
    comparison.judge();
    if (gradients)
      for (const auto& [name, tensor] : wanted.grad)
        if (given.grad.contains(name)) comparison.add("grad." + name, given.grad.at(name), tensor);
    comparison.judge();
    return gate;
  }

  // Outputs on [begin, end) of the full case against those of the piece alone, after its state.
  const auto compare_piece = [&](std::string_view judge, at::Device device, std::int64_t begin,
                                 std::int64_t end, const TensorMap& state) -> Status {
    EVERLONG_ASSIGN(const auto given, op.run(form, only_from(call, begin, end)));
    OpCall piece =
        only_from(widened(op, slice_call(op, call, begin, end, state), device), 0, end - begin);
    EVERLONG_ASSIGN(const auto wanted, op.run(judge, piece));
    for (const auto& [name, tensor] : wanted.out)
      comparison.add(name, given.out.at(name).narrow(1, begin, end - begin), tensor);
    comparison.judge();
    if (end == tokens)
      for (const auto& [name, tensor] : wanted.state)
        comparison.add("state." + name, given.state.at(name), tensor);
    comparison.judge();
    for (const auto& name : names) {
      const auto found = wanted.grad.find(name);
      if (gradients && found != wanted.grad.end())
        comparison.add("grad." + name, given.grad.at(name).narrow(1, begin, end - begin),
                       found->second);
    }
    comparison.judge();
    return {};
  };
  gate.against = cat("reference, first ", kGateTokens, " tokens");
  EVERLONG_RETURN_IF_ERROR(
      compare_piece(op.forms().front().name, at::kCPU, 0, kGateTokens, to_double(call.state)));
  const at::Device device = call.inputs.at(names.front()).device();
  if (flops <= (device.is_cuda() ? kBearableFlopsCuda : kBearableFlopsCpu)) {
    EVERLONG_ASSIGN(const auto state,
                    state_after(op, "composite", call, tokens - kGateTokens, at::kDouble));
    EVERLONG_RETURN_IF_ERROR(
        compare_piece("composite", device, tokens - kGateTokens, tokens, state));
    gate.against += cat("; composite fp64, last ", kGateTokens, " tokens and state");
  }
  return gate;
}

}  // namespace everlong
