// Laws 2 and 10: pieces equal the whole; packed equals one by one; the past does not see the
// future.
#include <random>

#include "cases.h"
#include "laws.h"

namespace everlong::laws {
namespace {

constexpr int kSplits = 20;

std::vector<std::int64_t> random_cuts(std::int64_t tokens, std::mt19937_64& random) {
  std::vector<std::int64_t> cuts = {0, tokens};
  const auto pieces = 1 + random() % 5;
  for (std::uint64_t i = 0; i < pieces; ++i)
    cuts.push_back(static_cast<std::int64_t>(random() % (tokens + 1)));
  std::ranges::sort(cuts);  // equal neighbours make an empty piece: legal, and must change nothing
  return cuts;
}

OpCall piece_of(const Operator& op, const OpCall& call, std::int64_t begin, std::int64_t end) {
  OpCall piece = call;
  for (const auto& name : op.token_inputs())
    piece.inputs[name] = call.inputs.at(name).narrow(1, begin, end - begin);
  return piece;
}

// Runs the pieces forward, then backward from the last: the incoming gradient of a piece's final
// state is the gradient of the next piece's initial state. Joins everything into what one pass
// would have returned.
Result<OpResult> run_in_pieces(const Operator& op, std::string_view form, const OpCall& whole,
                               const std::vector<std::int64_t>& cuts) {
  std::vector<OpCall> calls;
  TensorMap state = whole.state;
  OpResult joined;
  std::map<std::string, std::vector<at::Tensor>> outs, grads;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    OpCall call = piece_of(op, whole, cuts[i], cuts[i + 1]);
    call.grad_out.clear();
    call.state = state;
    EVERLONG_ASSIGN(OpResult result, op.run(form, call));
    for (const auto& [name, t] : result.out) outs[name].push_back(t);
    state = result.state;
    calls.push_back(std::move(call));
  }
  joined.state = state;
  for (auto& [name, parts] : outs) joined.out[name] = at::cat(parts, 1);

  TensorMap incoming;
  for (const auto& [name, t] : whole.grad_out)
    if (name.starts_with("state.")) incoming[name] = t;
  for (std::size_t i = calls.size(); i-- > 0;) {
    calls[i].grad_out = incoming;
    for (const auto& [name, t] : whole.grad_out)
      if (!name.starts_with("state."))
        calls[i].grad_out[name] = t.narrow(1, cuts[i], cuts[i + 1] - cuts[i]);
    EVERLONG_ASSIGN(const OpResult result, op.run(form, calls[i]));
    incoming.clear();
    for (const auto& [name, t] : result.grad) {
      if (name.starts_with("state.")) {
        incoming[name] = t;
        if (i == 0 && !whole.state.empty()) joined.grad[name] = t;
      } else if (std::ranges::count(op.token_inputs(), name) > 0) {
        grads[name].insert(grads[name].begin(), t);
      } else {
        joined.grad[name] = joined.grad.contains(name) ? joined.grad[name] + t : t;
      }
    }
  }
  for (auto& [name, parts] : grads) joined.grad[name] = at::cat(parts, 1);
  return joined;
}

void compare(const std::string& what, const OpResult& actual, const OpResult& expected,
             double allowed, Violations& broken) {
  const TensorMap a = flat(actual), b = flat(expected);
  for (const auto& [name, t] : b) {
    const double error = a.contains(name) ? test::relative_error(a.at(name), t) : INFINITY;
    if (!(error <= allowed))
      broken.push_back(cat(what, ": ", name, " differs by ", error, ", allowed ", allowed));
  }
}

}  // namespace

Violations any_split_is_one_pass(const Operator& op, at::Device device) {
  Violations broken;
  std::mt19937_64 random(42);
  const auto forms = op.forms();
  for (const Run& run : runs_on(forms, device)) {
    const bool used = run.form->name != "naive" && !run.form->name.starts_with("reference") &&
                      run.dtype != at::kBFloat16;
    for (const OpShape& shape : shapes_of(op, 130)) {
      OpCall call = cast(op, op.sample(shape), device, run.dtype);
      auto whole = op.run(run.form->name, call);
      if (!whole.ok()) {
        broken.push_back(cat(label(op, run, shape), ": ", whole.status().message()));
        continue;
      }
      seed_all(shape.seed);
      call.grad_out = random_gradients(*whole);
      whole = op.run(run.form->name, call);
      // Every form, dtype and shape is cut; what users run, more often.
      const int splits = !used ? 1 : shape.seed <= 2 ? kSplits : 3;
      for (int i = 0; i < splits; ++i) {
        const auto cuts = random_cuts(shape.tokens, random);
        const auto pieces = run_in_pieces(op, run.form->name, call, cuts);
        if (!pieces.ok()) {
          broken.push_back(cat(label(op, run, shape), " in pieces: ", pieces.status().message()));
          break;
        }
        compare(cat(label(op, run, shape), " in ", cuts.size() - 1, " pieces"), *pieces, *whole,
                tolerance::split_of(run.dtype), broken);
      }
    }
  }
  return broken;
}

Violations packed_is_one_by_one(const Operator& op, at::Device device) {
  Violations broken;
  const auto forms = op.forms();
  const OpShape shape = packed_shape(11);
  const auto sequences = static_cast<std::int64_t>(shape.cu_seqlens.size()) - 1;
  for (const Run& run : runs_on(forms, device)) {
    const OpCall call = cast(op, op.sample(shape), device, run.dtype);
    const auto packed = op.run(run.form->name, call);
    if (!packed.ok()) {
      broken.push_back(cat(label(op, run, shape), ": ", packed.status().message()));
      continue;
    }
    for (std::int64_t n = 0; n < sequences; ++n) {
      OpCall alone = piece_of(op, call, shape.cu_seqlens[n], shape.cu_seqlens[n + 1]);
      alone.cu_seqlens.clear();
      for (auto& [name, t] : alone.state) t = t.narrow(0, n, 1);
      const auto single = op.run(run.form->name, alone);
      if (!single.ok()) {
        broken.push_back(
            cat(label(op, run, shape), " sequence ", n, ": ", single.status().message()));
        continue;
      }
      for (const auto& [name, t] : single->out) {
        const auto part = packed->out.at(name).narrow(1, shape.cu_seqlens[n], t.size(1));
        if (!(test::relative_error(part, t) <= tolerance::split_of(run.dtype)))
          broken.push_back(
              cat(label(op, run, shape), ": sequence ", n, " alone gives another ", name));
      }
      for (const auto& [name, t] : single->state) {
        const auto part = packed->state.at(name).narrow(0, n, 1);
        // A buffer may be longer beside others; the tokens that follow test what counts.
        if (part.sizes() == t.sizes() &&
            !(test::relative_error(part, t) <= tolerance::split_of(run.dtype)))
          broken.push_back(
              cat(label(op, run, shape), ": sequence ", n, " alone ends in another state ", name));
      }
    }
    // A NaN in one sequence is that sequence's own misfortune.
    OpCall spoiled = call;
    for (const auto& name : op.token_inputs()) {
      spoiled.inputs[name] = call.inputs.at(name).clone();
      spoiled.inputs[name].narrow(1, shape.cu_seqlens[3] + 1, 1).fill_(std::nan(""));
    }
    const auto sick = op.run(run.form->name, spoiled);
    if (!sick.ok()) continue;  // refusing NaN is a way of containing it
    for (const auto& [name, t] : sick->out) {
      const auto healthy = [&](const at::Tensor& all) {
        return at::cat({all.narrow(1, 0, shape.cu_seqlens[3]),
                        all.narrow(1, shape.cu_seqlens[4], shape.tokens - shape.cu_seqlens[4])},
                       1);
      };
      if (!test::same_bits(healthy(t), healthy(packed->out.at(name))))
        broken.push_back(cat(label(op, run, shape), ": a NaN in sequence 3 changed ", name,
                             " of other sequences"));
    }
    for (const auto& [name, t] : sick->state) {
      const auto healthy = [&](const at::Tensor& all) {
        return at::cat({all.narrow(0, 0, 3), all.narrow(0, 4, sequences - 4)});
      };
      if (!test::same_bits(healthy(t), healthy(packed->state.at(name))))
        broken.push_back(cat(label(op, run, shape), ": a NaN in sequence 3 changed the state ",
                             name, " of other sequences"));
    }
  }
  return broken;
}

Violations past_ignores_future(const Operator& op, at::Device device) {
  Violations broken;
  const auto forms = op.forms();
  for (const Run& run : runs_on(forms, device)) {
    for (const OpShape& shape : shapes_of(op, 130)) {
      const OpCall call = cast(op, op.sample(shape), device, run.dtype);
      const auto before = op.run(run.form->name, call);
      for (const std::int64_t changed :
           {std::int64_t{1}, std::int64_t{64}, std::int64_t{77}, shape.tokens - 1}) {
        OpCall other = call;
        seed_all(shape.seed + 5);
        for (const auto& name : op.token_inputs()) {
          auto t = call.inputs.at(name).clone();
          t.narrow(1, changed, shape.tokens - changed)
              .copy_(at::randn_like(t.narrow(1, changed, shape.tokens - changed)));
          other.inputs[name] = t;
        }
        const auto after = op.run(run.form->name, other);
        if (!before.ok() || !after.ok()) {
          broken.push_back(cat(label(op, run, shape), ": refused: ", before.status().message()));
          break;
        }
        for (const auto& [name, t] : before->out) {
          if (!test::same_bits(t.narrow(1, 0, changed), after->out.at(name).narrow(1, 0, changed)))
            broken.push_back(cat(label(op, run, shape), ": changing tokens from ", changed,
                                 " changed ", name, " before"));
          if (test::same_bits(t, after->out.at(name)))
            broken.push_back(
                cat(label(op, run, shape), ": changing tokens from ", changed, " changed nothing"));
        }
      }
    }
  }
  return broken;
}

}  // namespace everlong::laws
