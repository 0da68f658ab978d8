// Laws 5, 7, 8 and 9: poisoned memory, repeatability, refusals, awkward lengths and strides.
#include <ATen/Context.h>

#include "cases.h"
#include "laws.h"

namespace everlong::laws {
namespace {

// While it lives, every uninitialised allocation of ATen is filled with NaN (integers: the largest
// value).
class PoisonedMemory {
 public:
  PoisonedMemory() {
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
    at::globalContext().setDeterministicFillUninitializedMemory(true);
  }
  ~PoisonedMemory() { at::globalContext().setDeterministicAlgorithms(false, false); }
  PoisonedMemory(const PoisonedMemory&) = delete;
  PoisonedMemory& operator=(const PoisonedMemory&) = delete;
};

Result<OpCall> with_gradients(const Operator& op, OpCall call, std::string_view form) {
  EVERLONG_ASSIGN(const OpResult plain, op.run(form, call));
  seed_all(3);
  call.grad_out = random_gradients(plain);
  return call;
}

void compare_bits(const std::string& what, const Result<OpResult>& a, const Result<OpResult>& b,
                  Violations& broken) {
  if (!a.ok() || !b.ok())
    return broken.push_back(cat(what, ": refused: ", a.status().message(), b.status().message()));
  const TensorMap first = flat(*a), second = flat(*b);
  for (const auto& [name, t] : first) {
    if (!second.contains(name) || !test::same_bits(t, second.at(name)))
      broken.push_back(cat(what, ": ", name, " differs"));
    if (t.is_floating_point() && !at::isfinite(t).all().item<bool>())
      broken.push_back(cat(what, ": ", name, " holds what is not finite"));
  }
}

// The same values behind other strides: every tensor is cut out of a wider one whose rest is NaN,
// heads before tokens.
at::Tensor strided_copy(const at::Tensor& t) {
  if (t.dim() != 4 || !t.is_floating_point()) return t;
  const auto wide =
      at::full({t.size(0), t.size(2), t.size(1) + 3, t.size(3) + 5}, std::nan(""), t.options());
  const auto view = wide.narrow(2, 2, t.size(1)).narrow(3, 0, t.size(3)).transpose(1, 2);
  view.copy_(t);
  return view;
}

}  // namespace

Violations poison_is_overwritten(const Operator& op, at::Device device) {
  Violations broken;
  const auto forms = op.forms();
  for (const Run& run : runs_on(forms, device)) {
    for (const std::int64_t tokens : {1, 65}) {
      for (const OpShape& shape : shapes_of(op, tokens)) {
        const auto call =
            with_gradients(op, cast(op, op.sample(shape), device, run.dtype), run.form->name);
        if (!call.ok()) {
          broken.push_back(cat(label(op, run, shape), ": ", call.status().message()));
          continue;
        }
        const auto clean = op.run(run.form->name, *call);
        const PoisonedMemory poison;
        compare_bits(cat(label(op, run, shape), " on poisoned memory"), clean,
                     op.run(run.form->name, *call), broken);
      }
    }
  }
  return broken;
}

Violations same_input_same_bits(const Operator& op, at::Device device) {
  Violations broken;
  const auto forms = op.forms();
  for (const Run& run : runs_on(forms, device)) {
    for (OpShape shape : shapes_of(op, 130)) {
      const auto call =
          with_gradients(op, cast(op, op.sample(shape), device, run.dtype), run.form->name);
      if (!call.ok()) {
        broken.push_back(cat(label(op, run, shape), ": ", call.status().message()));
        continue;
      }
      compare_bits(cat(label(op, run, shape), " run twice"), op.run(run.form->name, *call),
                   op.run(run.form->name, *call), broken);
    }
  }
  return broken;
}

Violations bad_calls_are_refused(const Operator& op, at::Device device) {
  Violations broken;
  const auto refusals = op.refusals();
  if (refusals.size() < 5)
    broken.push_back(cat(op.kind(), " names ", refusals.size(), " bad calls only"));
  for (const OpForm& form : op.forms()) {
    if (device.is_cpu() ? !form.cpu : !form.cuda) continue;
    for (const auto& [what, call] : refusals) {
      OpCall moved = call;  // only moved: a wrong dtype may be the point
      for (auto* tensors : {&moved.inputs, &moved.state})
        for (auto& [name, t] : *tensors) t = t.to(device);
      try {
        const auto result = op.run(form.name, moved);
        if (result.ok())
          broken.push_back(cat(op.kind(), " ", form.name, " accepts ", what));
        else if (result.status().message().size() < 20)
          broken.push_back(cat(op.kind(), " ", form.name, ": ", what,
                               ": message says too little: ", result.status().message()));
      } catch (const std::exception& error) {
        broken.push_back(cat(op.kind(), " ", form.name, " throws on ", what,
                             " after work began: ", error.what()));
      }
    }
    if (const auto unknown = op.run("no_such_form", refusals.front().second); unknown.ok())
      broken.push_back(cat(op.kind(), " runs a form that does not exist"));
  }
  return broken;
}

Violations awkward_lengths_and_strides(const Operator& op, at::Device device) {
  Violations broken;
  const auto forms = op.forms();
  std::map<std::pair<std::int64_t, at::ScalarType>, Result<OpResult>>
      truths;  // the reference at T = 1000 takes a while
  for (const Run& run : runs_on(forms, device)) {
    for (const std::int64_t tokens : kLengths) {
      // The oracle's other forms are held against it at shorter lengths (law 1).
      if (tokens == 1000 && run.form->name.starts_with("reference")) continue;
      OpShape shape;
      shape.batch = 2;
      shape.tokens = tokens;
      shape.initial_state = tokens % 2 == 1;
      shape.seed = static_cast<std::uint64_t>(tokens) + 21;
      const auto call =
          with_gradients(op, cast(op, op.sample(shape), device, run.dtype), run.form->name);
      if (!call.ok()) {
        broken.push_back(cat(label(op, run, shape), ": ", call.status().message()));
        continue;
      }
      const auto result = op.run(run.form->name, *call);
      const auto key = std::pair{tokens, run.dtype};
      if (!truths.contains(key)) truths.emplace(key, truth(op, *call));
      const auto& expected = truths.at(key);
      if (!result.ok() || !expected.ok()) {
        broken.push_back(cat(label(op, run, shape), ": ", result.status().message(),
                             expected.status().message()));
        continue;
      }
      const double allowed = run.dtype == at::kDouble ? 1e-11 : 4 * tolerance::floor_of(run.dtype);
      for (const auto& [name, t] : flat(*expected)) {
        const TensorMap actual = flat(*result);
        const double error =
            actual.contains(name) ? test::relative_error(actual.at(name), t) : INFINITY;
        if (!(error <= allowed))
          broken.push_back(cat(label(op, run, shape), ": ", name, " is off by ", error));
      }
      OpCall strided = *call;
      for (const auto& name : op.token_inputs())
        strided.inputs[name] = strided_copy(call->inputs.at(name));
      for (auto& [name, t] : strided.grad_out)
        if (!name.starts_with("state.")) t = strided_copy(t);
      // Not bit for bit: a matrix product may choose another kernel by strides.
      const auto behind = op.run(run.form->name, strided);
      if (!behind.ok()) {
        broken.push_back(
            cat(label(op, run, shape), " behind free strides: ", behind.status().message()));
        continue;
      }
      for (const auto& [name, t] : flat(*behind)) {
        const double error = test::relative_error(t, flat(*result).at(name));
        if (!(error <= tolerance::floor_of(run.dtype)))
          broken.push_back(
              cat(label(op, run, shape), " behind free strides: ", name, " is off by ", error));
      }
    }
  }
  return broken;
}

Violations more_than_2_to_the_31_elements(const Operator& op, at::Device device) {
  Violations broken;
  // 4097 x 256 x 16 x 128 = 2^31 + 2^19 elements; the last row must be what it is alone.
  OpShape shape;
  shape.batch = 1;
  shape.tokens = 256;
  shape.heads = shape.kv_heads = 16;
  shape.key_dim = shape.value_dim = 128;
  constexpr std::int64_t kRows = 4097;
  OpCall alone = cast(op, op.sample(shape), device, at::kBFloat16);
  const auto forms = op.forms();
  for (const OpForm& form : forms) {
    if (!form.low_precision || form.name == "naive" || (device.is_cpu() ? !form.cpu : !form.cuda))
      continue;
    const auto single = op.run(form.name, alone);
    OpCall all = alone;
    for (const auto& name : op.token_inputs()) {
      const auto& row = alone.inputs.at(name);
      auto big = at::zeros({kRows, row.size(1), row.size(2), row.size(3)}, row.options());
      big.narrow(0, kRows - 1, 1).copy_(row);
      all.inputs[name] = big;
    }
    const auto result = op.run(form.name, all);
    if (!single.ok() || !result.ok()) {
      broken.push_back(cat(op.kind(), " ", form.name, ": ", single.status().message(),
                           result.status().message()));
      continue;
    }
    for (const auto& [name, t] : single->out) {
      const double error = test::relative_error(result->out.at(name).narrow(0, kRows - 1, 1), t);
      if (!(error <= tolerance::split_of(at::kBFloat16)))
        broken.push_back(
            cat(op.kind(), " ", form.name, ": past 2^31 elements ", name, " is off by ", error));
    }
  }
  return broken;
}

}  // namespace everlong::laws
