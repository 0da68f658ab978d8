// Laws 1 and 4: every form, dtype and device agrees with the float64 reference, in values and in
// gradients.
#include "cases.h"
#include "laws.h"

namespace everlong::laws {
namespace {

// Errors of every tensor of `result` against the reference's.
std::map<std::string, double> errors(const OpResult& result, const OpResult& expected) {
  std::map<std::string, double> out;
  const TensorMap actual = flat(result), wanted = flat(expected);
  for (const auto& [name, tensor] : wanted) {
    const auto found = actual.find(name);
    out[name] = found == actual.end() ? std::numeric_limits<double>::infinity()
                                      : test::relative_error(found->second, tensor);
  }
  return out;
}

void compare_forms(const Operator& op, at::Device device, const OpShape& shape, bool gradients,
                   Violations& broken) {
  const auto forms = op.forms();
  OpCall call = op.sample(shape);
  if (gradients) {
    const auto plain = op.run(forms.front().name, call);
    if (!plain.ok())
      return broken.push_back(cat(op.kind(), " reference: ", plain.status().message()));
    seed_all(shape.seed);
    call.grad_out = random_gradients(*plain);
  }
  std::map<at::ScalarType, std::map<std::string, double>> naive;
  for (const Run& run : runs_on(forms, device)) {
    const OpCall given = cast(op, call, device, run.dtype);
    const auto expected = truth(op, given);
    const auto actual = op.run(run.form->name, given);
    if (!expected.ok() || !actual.ok()) {
      broken.push_back(cat(label(op, run, shape), ": refused: ", actual.status().message(),
                           expected.status().message()));
      continue;
    }
    const auto found = errors(*actual, *expected);
    if (run.form->name == "naive") naive[run.dtype] = found;
    for (const auto& [name, error] : found) {
      double allowed = tolerance::kFormsFloat64;
      if (run.dtype != at::kDouble)
        allowed = 2 * (run.form->name == "naive" ? 0.0 : naive[run.dtype][name]) +
                  tolerance::floor_of(run.dtype);
      if (!(error <= allowed))
        broken.push_back(
            cat(label(op, run, shape), ": ", name, " is off by ", error, ", allowed ", allowed));
    }
  }
}

double loss(const OpResult& result, const TensorMap& grad_out) {
  double sum = 0;
  for (const auto& [name, t] : result.out) sum += (t * grad_out.at(name)).sum().item<double>();
  for (const auto& [name, t] : result.state)
    if (grad_out.contains("state." + name))
      sum += (t * grad_out.at("state." + name)).sum().item<double>();
  return sum;
}

// The reference's gradient along a random direction of each differentiable tensor, against central
// differences.
void differences(const Operator& op, const OpShape& shape, Violations& broken) {
  const std::string reference = op.forms().front().name;
  OpCall call = op.sample(shape);
  const auto plain = op.run(reference, call);
  if (!plain.ok())
    return broken.push_back(cat(op.kind(), " reference: ", plain.status().message()));
  seed_all(shape.seed + 1000);
  call.grad_out = random_gradients(*plain);
  const auto result = op.run(reference, call);
  if (!result.ok())
    return broken.push_back(cat(op.kind(), " reference: ", result.status().message()));
  for (const auto& [name, gradient] : result->grad) {
    const bool is_state = name.starts_with("state.");
    const std::string key = is_state ? name.substr(6) : name;
    const at::Tensor original = (is_state ? call.state : call.inputs).at(key);
    const at::Tensor direction = at::randn_like(original);
    constexpr double kStep = 1e-4;
    const auto at_offset = [&](double offset) {
      OpCall moved = call;
      (is_state ? moved.state : moved.inputs)[key] = original + offset * direction;
      moved.grad_out.clear();
      return loss(*op.run(reference, moved), call.grad_out);
    };
    const double numeric = (at_offset(kStep) - at_offset(-kStep)) / (2 * kStep);
    const double exact = (gradient * direction).sum().item<double>();
    const double scale = std::max({std::abs(numeric), gradient.norm().item<double>(), 1e-3});
    if (!(std::abs(numeric - exact) <= tolerance::kFiniteDifference * scale))
      broken.push_back(cat(label(op, {&op.forms().front(), at::kDouble}, shape), ": gradient of ",
                           name, " is ", exact, ", finite differences say ", numeric));
  }
}

}  // namespace

Violations forms_agree(const Operator& op, at::Device device) {
  Violations broken;
  for (const OpShape& shape : shapes_of(op, 65)) compare_forms(op, device, shape, false, broken);
  for (const OpShape& shape : packed_shapes(op)) compare_forms(op, device, shape, false, broken);
  return broken;
}

Violations gradients_agree(const Operator& op, at::Device device) {
  Violations broken;
  for (const OpShape& shape : shapes_of(op, 65)) compare_forms(op, device, shape, true, broken);
  for (const OpShape& shape : packed_shapes(op)) compare_forms(op, device, shape, true, broken);
  for (OpShape shape : shapes_of(op, 7)) differences(op, shape, broken);
  differences(op, packed_shape(9), broken);
  return broken;
}

}  // namespace everlong::laws
