// The gate must see every kind of wrong result: these operators go wrong on purpose.
#include "eval/op_gate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "eval/op_speed.h"
#include "mechanisms/mechanism.h"

namespace everlong {
namespace {

const Operator& sequence_operator(const std::string& mechanism) {
  for (const Operator* op : (*find_mechanism(mechanism))->operators)
    if (op->is_sequence()) return *op;
  throw std::runtime_error("no operator over sequences");
}

// Another operator whose form "spoilt" is its composite form with something done to the result.
class Spoilt : public Operator {
 public:
  Spoilt(const Operator& sound, std::function<void(OpResult&)> fault)
      : sound_(sound), fault_(std::move(fault)) {}
  std::string_view kind() const override { return sound_.kind(); }
  std::vector<OpForm> forms() const override { return sound_.forms(); }
  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    auto result = sound_.run(form == "spoilt" ? "composite" : form, call);
    if (result.ok() && form == "spoilt") fault_(*result);
    return result;
  }
  OpCall sample(const OpShape& shape) const override { return sound_.sample(shape); }
  std::vector<std::string> token_inputs() const override { return sound_.token_inputs(); }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override { return {}; }
  OpCost cost(const OpShape& shape, std::string_view pass, std::size_t bytes) const override {
    return sound_.cost(shape, pass, bytes);
  }

 private:
  const Operator& sound_;
  std::function<void(OpResult&)> fault_;
};

constexpr double kCheap = 1e6;  // floating-point operations: the end of a long case is checked

OpGate gate_of(const std::string& mechanism, std::int64_t tokens, bool gradients,
               at::ScalarType dtype, std::function<void(OpResult&)> fault, double flops = kCheap) {
  const Spoilt op(sequence_operator(mechanism), std::move(fault));
  OpCall call = cast_call(op, op.sample({.tokens = tokens, .seed = 3}), dtype, at::kCPU);
  if (gradients) {
    const auto result = op.run("composite", call);
    for (const auto& [name, tensor] : result->out) call.grad_out[name] = at::randn_like(tensor);
  }
  const auto gate = check_op(op, "spoilt", call, tokens, dtype, flops);
  EXPECT_TRUE(gate.ok()) << gate.status().message();
  return gate.ok() ? *gate : OpGate{};
}

void add_at(at::Tensor& tensor, std::int64_t token, double value) {
  tensor = tensor.clone();
  tensor.select(1, token).add_(value);
}

TEST(OpGate, PassesWhatIsRight) {
  for (const char* const mechanism : {"lightning", "softmax"})
    for (const std::int64_t tokens : {1, 100, 1500})
      for (const bool gradients : {false, true})
        for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
          const OpGate gate = gate_of(mechanism, tokens, gradients, dtype, [](OpResult&) {});
          EXPECT_TRUE(gate.passed()) << mechanism << ", " << tokens << " tokens: " << gate.worst
                                     << " " << gate.max_rel_error;
          if (tokens == 1) continue;
          EXPECT_GT(gate.max_rel_error, 0) << "no two ways of adding agree to the last bit";
        }
}

TEST(OpGate, SeesAWrongTokenAtEitherEndOfALongCase) {
  for (const std::int64_t token : {0, 1023, 1600, 2499}) {
    const OpGate gate = gate_of("lightning", 2500, false, at::kFloat,
                                [&](OpResult& result) { add_at(result.out["o"], token, 1); });
    EXPECT_FALSE(gate.passed()) << "token " << token;
    EXPECT_EQ(gate.worst, "o");
  }
}

TEST(OpGate, SeesAWrongStateAndAWrongGradient) {
  for (const std::int64_t tokens : {100, 2500}) {
    EXPECT_FALSE(gate_of("lightning", tokens, false, at::kFloat, [](OpResult& result) {
                   for (auto& [name, tensor] : result.state) tensor = tensor * 1.01;
                 }).passed());
    for (const char* const name : {"q", "k", "v"}) {
      const OpGate gate = gate_of("lightning", tokens, true, at::kFloat, [&](OpResult& result) {
        if (!result.grad.empty()) result.grad[name] = result.grad[name] * 1.01;
      });
      EXPECT_FALSE(gate.passed()) << name;
      EXPECT_EQ(gate.worst, std::string("grad.") + name);
    }
  }
}

TEST(OpGate, NotANumberDoesNotPass) {
  const OpGate gate = gate_of("lightning", 100, false, at::kFloat,
                              [](OpResult& result) { add_at(result.out["o"], 50, NAN); });
  EXPECT_FALSE(gate.passed());
}

TEST(OpGate, SaysWhatWasCompared) {
  const auto against = [](std::int64_t tokens, double flops) {
    return gate_of(
               "lightning", tokens, false, at::kFloat, [](OpResult&) {}, flops)
        .against;
  };
  EXPECT_EQ(against(100, kCheap), "reference, all 100 tokens");
  EXPECT_EQ(against(2500, kCheap),
            "reference, first 1024 tokens; composite fp64, last 1024 tokens and state");
  EXPECT_EQ(against(2500, 1e18), "reference, first 1024 tokens");
}

TEST(OpSpeed, RefusesWhatItDoesNotKnow) {
  const Ceilings ceilings{1, 1};
  const auto refused = [&](OpBenchCase wanted) { return !bench_op(wanted, ceilings).ok(); };
  OpBenchCase wanted;
  wanted.shape.tokens = 8;
  EXPECT_FALSE(refused(wanted));
  for (auto* const field :
       {&wanted.mechanism, &wanted.kind, &wanted.form, &wanted.pass, &wanted.baseline}) {
    const std::string before = *field;
    *field = "nonsense";
    EXPECT_TRUE(refused(wanted));
    *field = before;
  }
  wanted.shape.tokens = 0;
  EXPECT_TRUE(refused(wanted));
}

}  // namespace
}  // namespace everlong
