#include "mechanisms/megalodon/op_operator.h"

#include <ATen/CPUGeneratorImpl.h>

namespace everlong::megalodon {

EmaWeights ema_weights(const TensorMap& inputs, const std::string& prefix) {
  return {inputs.at(prefix + "alpha"), inputs.at(prefix + "delta"), inputs.at(prefix + "theta"),
          inputs.at(prefix + "gamma"), inputs.at(prefix + "omega")};
}

Status check_ema_weights(const OpCall& call, std::int64_t width) {
  const at::Tensor& alpha = call.inputs.at("w.alpha");
  EVERLONG_RETURN_IF_ERROR(check_shape("w.alpha", alpha, {width, -1, 1}));
  const std::int64_t modes = alpha.size(1);
  EVERLONG_RETURN_IF_ERROR(check_shape("w.delta", call.inputs.at("w.delta"), {width, modes, 1}));
  EVERLONG_RETURN_IF_ERROR(check_shape("w.theta", call.inputs.at("w.theta"), {width, 1, 1}));
  EVERLONG_RETURN_IF_ERROR(check_shape("w.gamma", call.inputs.at("w.gamma"), {width, modes, 2}));
  EVERLONG_RETURN_IF_ERROR(check_shape("w.omega", call.inputs.at("w.omega"), {width, 1}));
  return check_ema(width, modes);
}

Draw::Draw(std::uint64_t seed) : generator_(at::detail::createCPUGenerator(seed)) {}

at::Tensor Draw::operator()(at::IntArrayRef sizes, double scale, double mean) {
  return at::randn(sizes, generator_, at::kDouble).mul_(scale).add_(mean);
}

void draw_ema_weights(Draw& draw, OpCall& call, std::int64_t width, std::int64_t modes) {
  call.inputs["w.alpha"] = draw({width, modes, 1});
  call.inputs["w.delta"] = draw({width, modes, 1});
  call.inputs["w.theta"] = draw({width, 1, 1}, 1, -1);
  call.inputs["w.gamma"] = draw({width, modes, 2});
  call.inputs["w.omega"] = draw({width, 1});
}

void draw_norm_state(Draw& draw, OpCall& call, std::int64_t sequences, std::int64_t groups) {
  std::vector<std::int64_t> counts;
  for (std::int64_t n = 0; n < sequences; ++n)
    counts.push_back(n == 1 ? 0 : 3 + 5 * n);  // one of them fresh where there are several
  call.state["count"] = at::tensor(counts, at::kLong);
  call.state["mean"] = draw({sequences, groups}, 0.5);
  call.state["var"] = draw({sequences, groups}, 0.3).abs() + 0.5;
}

std::span<const double> numbers(const std::vector<double>& values) { return values; }

at::Tensor sequence_view(const at::Tensor& x, const OpCall& call, std::int64_t n) {
  if (call.cu_seqlens.empty()) return x.select(0, n);
  const auto at = static_cast<std::size_t>(n);
  return x.select(0, 0).narrow(0, call.cu_seqlens[at],
                               call.cu_seqlens[at + 1] - call.cu_seqlens[at]);
}

std::vector<double> sequence_doubles(const at::Tensor& x, const OpCall& call, std::int64_t n) {
  return x.defined() ? to_doubles(sequence_view(x, call, n)) : std::vector<double>();
}

Status unknown_form(std::string_view form, const std::vector<OpForm>& forms) {
  std::vector<std::string> names;
  for (const OpForm& known : forms) names.push_back(known.name);
  return invalid_argument("megalodon: \"", form, "\" is not a form; known: ", join(names, ", "));
}

}  // namespace everlong::megalodon
