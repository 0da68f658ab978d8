// A law that cannot fail protects nothing: here every law meets a room with the fault it exists
// for, and must say so.
#include <gtest/gtest.h>

#include "cases.h"
#include "laws.h"

namespace everlong::laws {
namespace {

const Operator& sound_operator() { return *find_mechanism("lightning").value()->operators.front(); }

// The sound operator, with its composite form spoiled.
class FaultyOperator : public Operator {
 public:
  using Before = std::function<void(OpCall&)>;
  using After = std::function<void(const OpCall&, OpResult&)>;
  FaultyOperator(Before before, After after)
      : before_(std::move(before)), after_(std::move(after)) {}

  std::string_view kind() const override { return sound_operator().kind(); }
  std::vector<OpForm> forms() const override {
    std::vector<OpForm> forms;
    for (const OpForm& form : sound_operator().forms())
      if (form.name == "reference" || form.name == "naive" || form.name == "composite")
        forms.push_back(form);
    return forms;
  }
  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    if (form != "composite") return sound_operator().run(form, call);
    OpCall spoiled = call;
    if (before_) before_(spoiled);
    auto result = sound_operator().run(form, spoiled);
    if (result.ok() && after_) after_(call, *result);
    return result;
  }
  OpCall sample(const OpShape& shape) const override { return sound_operator().sample(shape); }
  std::vector<std::string> token_inputs() const override { return sound_operator().token_inputs(); }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    return sound_operator().refusals();
  }
  OpCost cost(const OpShape& shape, std::string_view pass, std::size_t bytes) const override {
    return sound_operator().cost(shape, pass, bytes);
  }

 private:
  Before before_;
  After after_;
};

void expect_caught(const Violations& broken) { EXPECT_FALSE(broken.empty()); }

TEST(PlantedFaults, Law1CatchesADecayOffByOneToken) {
  // lambda^i instead of lambda^(i+1) on what was carried in: invisible without an initial state.
  expect_caught(forms_agree(
      FaultyOperator(
          [](OpCall& call) {
            for (auto& [name, s] : call.state)
              s = s * at::exp(call.inputs.at("slope").to(s.scalar_type())).view({1, -1, 1, 1});
          },
          nullptr),
      at::kCPU));
}

TEST(PlantedFaults, Law2CatchesATailThatDecaysAsAFullBlock) {
  expect_caught(any_split_is_one_pass(
      FaultyOperator(nullptr,
                     [](const OpCall& call, OpResult& result) {
                       const auto missing =
                           static_cast<double>((64 - call.inputs.at("q").size(1) % 64) % 64);
                       for (auto& [name, s] : result.state)
                         s = s * at::exp(call.inputs.at("slope").to(s.scalar_type()) * -missing)
                                     .view({1, -1, 1, 1});
                     }),
      at::kCPU));
}

TEST(PlantedFaults, Law2CatchesAGradientThatStopsAtThePiece) {
  expect_caught(any_split_is_one_pass(FaultyOperator(nullptr,
                                                     [](const OpCall&, OpResult& result) {
                                                       if (result.grad.contains("state.S"))
                                                         result.grad["state.S"] =
                                                             at::zeros_like(result.grad["state.S"]);
                                                     }),
                                      at::kCPU));
}

TEST(PlantedFaults, Law2CatchesAStateThatCrossesADocumentBorder) {
  expect_caught(packed_is_one_by_one(
      FaultyOperator(nullptr,
                     [](const OpCall& call, OpResult& result) {
                       if (call.cu_seqlens.empty()) return;
                       const auto border = call.cu_seqlens[3];
                       result.out["o"]
                           .narrow(1, border, 1)
                           .add_(result.out["o"].narrow(1, border - 1, 1), 0.1);
                     }),
      at::kCPU));
}

TEST(PlantedFaults, Law2CatchesANaNThatTravelsThroughTimesZero) {
  expect_caught(packed_is_one_by_one(FaultyOperator(nullptr,
                                                    [](const OpCall&, OpResult& result) {
                                                      result.out["o"] = result.out["o"] +
                                                                        0 * result.out["o"].sum();
                                                    }),
                                     at::kCPU));
}

TEST(PlantedFaults, Law2CatchesANaNInANeighboursState) {
  expect_caught(packed_is_one_by_one(FaultyOperator(nullptr,
                                                    [](const OpCall& call, OpResult& result) {
                                                      if (call.cu_seqlens.empty()) return;
                                                      at::Tensor& s = result.state.at("S");
                                                      s = s + at::sum(s, {0}, true) * 0;
                                                    }),
                                     at::kCPU));
}

TEST(PlantedFaults, Law8CatchesSettingsThatNobodyChecks) {
  Mechanism careless = *find_mechanism("lightning").value();
  careless.make_layer = [](const LayerSpec& spec) {
    LayerSpec ignored = spec;
    ignored.settings = find_mechanism("lightning").value()->example_settings(spec.hidden_size);
    return find_mechanism("lightning").value()->make_layer(ignored);
  };
  expect_caught(settings_are_checked(careless));
}

TEST(PlantedFaults, Law4CatchesAGradientWithoutTheScale) {
  expect_caught(gradients_agree(FaultyOperator(nullptr,
                                               [](const OpCall& call, OpResult& result) {
                                                 if (!result.grad.contains("k")) return;
                                                 result.grad["k"] =
                                                     result.grad["k"] *
                                                     (1 + 1e-3 * call.inputs.at("q").size(3));
                                               }),
                                at::kCPU));
}

TEST(PlantedFaults, Law5CatchesARowThatNobodyWrote) {
  expect_caught(poison_is_overwritten(
      FaultyOperator(nullptr,
                     [](const OpCall&, OpResult& result) {
                       at::Tensor& o = result.out["o"];
                       if (o.size(1) == 0) return;
                       auto unwritten = at::empty_like(o, at::MemoryFormat::Contiguous);
                       unwritten.narrow(1, 0, o.size(1) - 1).copy_(o.narrow(1, 0, o.size(1) - 1));
                       o = unwritten;
                     }),
      at::kCPU));
}

TEST(PlantedFaults, Law7CatchesASumInRandomOrder) {
  expect_caught(same_input_same_bits(FaultyOperator(nullptr,
                                                    [](const OpCall&, OpResult& result) {
                                                      static int calls = 0;
                                                      result.out["o"] = result.out["o"] *
                                                                        (1 + 1e-6 * (++calls % 7));
                                                    }),
                                     at::kCPU));
}

TEST(PlantedFaults, Law8CatchesAnOperatorThatTakesAnything) {
  class Permissive : public FaultyOperator {
   public:
    using FaultyOperator::FaultyOperator;
    Result<OpResult> run(std::string_view form, const OpCall& call) const override {
      const auto result = FaultyOperator::run(form, call);
      return result.ok() ? result : Result<OpResult>(OpResult{});
    }
  };
  expect_caught(bad_calls_are_refused(Permissive(nullptr, nullptr), at::kCPU));
}

TEST(PlantedFaults, Law9CatchesALostLastToken) {
  expect_caught(awkward_lengths_and_strides(
      FaultyOperator(nullptr,
                     [](const OpCall&, OpResult& result) {
                       at::Tensor& o = result.out["o"];
                       if (o.size(1) % 64 == 1)
                         o = o.index_fill(1, at::scalar_tensor(o.size(1) - 1, at::kLong), 0);
                     }),
      at::kCPU));
}

TEST(PlantedFaults, Law9CatchesStridesReadAsContiguous) {
  expect_caught(awkward_lengths_and_strides(FaultyOperator(
                                                [](OpCall& call) {
                                                  auto& q = call.inputs["q"];
                                                  q = q.as_strided(q.sizes(),
                                                                   at::empty(q.sizes()).strides());
                                                },
                                                nullptr),
                                            at::kCPU));
}

TEST(PlantedFaults, Law10CatchesAPeekAtTheNextToken) {
  expect_caught(past_ignores_future(
      FaultyOperator(nullptr,
                     [](const OpCall& call, OpResult& result) {
                       at::Tensor& o = result.out["o"];
                       const auto n = o.size(1) - 1;
                       o.narrow(1, 0, n).add_(
                           call.inputs.at("v").narrow(1, 1, n).to(o.scalar_type()), 1e-3);
                     }),
      at::kCPU));
}

// The sound lightning layer, with the forward or the state spoiled.
class FaultyState : public State {
 public:
  enum class Fault { kNone, kGrows, kRounds, kSharesOnFork };
  FaultyState(std::unique_ptr<State> inner, Fault fault)
      : State(inner->sequences()), inner_(std::move(inner)), fault_(fault) {}

  TensorMap tensors() const override {
    TensorMap all = inner_->tensors();
    if (fault_ == Fault::kGrows) all["history"] = at::zeros({sequences(), 1 + positions()[0], 64});
    return all;
  }
  Status restore(const TensorMap& tensors) override {
    TensorMap rounded = tensors;
    if (fault_ == Fault::kRounds)
      for (auto& [name, t] : rounded)
        if (t.scalar_type() == at::kFloat) t = t.to(at::kBFloat16).to(at::kFloat);
    return inner_->restore(rounded);
  }
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override {
    auto picked = std::make_unique<FaultyState>(inner_->select(sequences), fault_);
    picked->positions() = picked->inner_->positions();
    if (fault_ == Fault::kSharesOnFork)
      for (auto& [name, t] : picked->inner_->tensors()) t.mul_(1 + 1e-6);
    return picked;
  }
  std::int64_t bytes_bound(std::int64_t tokens) const override {
    return inner_->bytes_bound(tokens);
  }

  std::unique_ptr<State> inner_;

 private:
  Fault fault_;
};

class FaultyMixer : public Mixer {
 public:
  using Spoil = std::function<void(const at::Tensor& x, State* state, at::Tensor& y)>;
  FaultyMixer(std::shared_ptr<Mixer> inner, FaultyState::Fault fault, Spoil spoil)
      : inner_(std::move(inner)), fault_(fault), spoil_(std::move(spoil)) {
    register_module("inner", inner_);
  }
  at::Tensor forward(const at::Tensor& x, const Sequences& sequences, State* state) override {
    auto* faulty = dynamic_cast<FaultyState*>(state);
    if (faulty != nullptr) faulty->inner_->positions() = faulty->positions();
    at::Tensor y =
        inner_->forward(x, sequences, faulty != nullptr ? faulty->inner_.get() : nullptr);
    if (spoil_) spoil_(x, faulty != nullptr ? faulty->inner_.get() : nullptr, y);
    if (faulty != nullptr) faulty->positions() = faulty->inner_->positions();
    return y;
  }
  std::unique_ptr<State> make_state(std::int64_t sequences) const override {
    return std::make_unique<FaultyState>(inner_->make_state(sequences), fault_);
  }
  std::string path(at::Device device) const override { return inner_->path(device); }

 private:
  std::shared_ptr<Mixer> inner_;
  FaultyState::Fault fault_;
  Spoil spoil_;
};

LayerCase faulty_layer(FaultyState::Fault fault, FaultyMixer::Spoil spoil) {
  LayerCase layer = layer_case(*find_mechanism("lightning").value(), at::kCPU);
  const auto sound = layer.make;
  layer.make = [=]() -> std::shared_ptr<Mixer> {
    return std::make_shared<FaultyMixer>(sound(), fault, spoil);
  };
  return layer;
}

// The wrapper itself is innocent: without a fault every law holds.
TEST(PlantedFaults, TheWrappersAloneBreakNothing) {
  EXPECT_TRUE(forms_agree(FaultyOperator(nullptr, nullptr), at::kCPU).empty());
  const LayerCase layer = faulty_layer(FaultyState::Fault::kNone, nullptr);
  EXPECT_TRUE(layer_split(layer, at::kCPU).empty());
  EXPECT_TRUE(state_goes_on(layer, at::kCPU).empty());
  EXPECT_TRUE(state_stays_in_bound(layer, at::kCPU).empty());
}

TEST(PlantedFaults, Law2CatchesALayerThatForgetsAtSingleTokens) {
  expect_caught(layer_split(faulty_layer(FaultyState::Fault::kNone,
                                         [](const at::Tensor& x, State* state, at::Tensor&) {
                                           if (state == nullptr || x.size(1) != 1) return;
                                           TensorMap zeros;
                                           for (const auto& [name, t] : state->tensors())
                                             zeros[name] = at::zeros_like(t);
                                           (void)state->restore(zeros);
                                         }),
                            at::kCPU));
}

TEST(PlantedFaults, Law2CatchesRaggedStreamsThatShareALength) {
  expect_caught(layer_ragged(faulty_layer(FaultyState::Fault::kNone,
                                          [](const at::Tensor&, State* state, at::Tensor&) {
                                            if (state == nullptr) return;
                                            auto& positions = state->positions();
                                            std::ranges::fill(positions,
                                                              std::ranges::max(positions));
                                          }),
                             at::kCPU));
}

TEST(PlantedFaults, Law3CatchesAStateThatKeepsTheText) {
  expect_caught(state_stays_in_bound(faulty_layer(FaultyState::Fault::kGrows, nullptr), at::kCPU));
}

TEST(PlantedFaults, Law6CatchesAStateSavedInLowPrecision) {
  expect_caught(state_goes_on(faulty_layer(FaultyState::Fault::kRounds, nullptr), at::kCPU));
}

TEST(PlantedFaults, Law6CatchesAForkThatIsNotACopy) {
  expect_caught(state_goes_on(faulty_layer(FaultyState::Fault::kSharesOnFork, nullptr), at::kCPU));
}

TEST(PlantedFaults, Law10CatchesALayerThatNormalisesOverTime) {
  expect_caught(
      layer_past_ignores_future(faulty_layer(FaultyState::Fault::kNone,
                                             [](const at::Tensor&, State*, at::Tensor& y) {
                                               y = y / (1 + 1e-3 * y.abs().mean(1, true));
                                             }),
                                at::kCPU));
}

}  // namespace
}  // namespace everlong::laws
