#include "models/recompute.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "support/small_models.h"

namespace everlong {
namespace {

TEST(Recompute, RunsTheBlockOnceForwardAndOnceBackward) {
  const at::Tensor weight = at::randn({4, 4}).set_requires_grad(true);
  int calls = 0;
  const BlockFunction block = [&](const at::Tensor& x, State*) {
    ++calls;
    return at::tanh(at::matmul(x, weight)) + x;
  };
  const at::Tensor x = at::randn({1, 3, 4}).set_requires_grad(true);
  const auto plain = torch::autograd::grad({block(x, nullptr).square().sum()}, {x, weight});
  calls = 0;
  const at::Tensor y = recomputed(block, x, nullptr, {weight});
  EXPECT_EQ(calls, 1);
  const auto again = torch::autograd::grad({y.square().sum()}, {x, weight});
  EXPECT_EQ(calls, 2);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_TRUE(plain[i].equal(again[i]));
}

TEST(Recompute, GivesTheParametersTheirGradientThroughBackwardToo) {
  const at::Tensor weight = at::randn({4, 4}).set_requires_grad(true);
  const at::Tensor x = at::randn({1, 3, 4});  // needs none itself
  const BlockFunction block = [&](const at::Tensor& input, State*) {
    return at::matmul(input, weight);
  };
  recomputed(block, x, nullptr, {weight}).sum().backward();
  recomputed(block, x, nullptr, {weight}).sum().backward();
  const at::Tensor expected = 2 * x[0].sum(0).unsqueeze(1).expand({4, 4});
  EXPECT_TRUE(at::allclose(weight.grad(), expected, 1e-5, 1e-6));
}

TEST(Recompute, DifferentiatesInTheStateThatGoesIn) {
  for (const Mechanism* mechanism : mechanisms()) {
    const auto config = test::small_config("llama", {mechanism->name});
    const auto model = test::small_model(config);
    Mixer& mixer = model->mixer(0);
    const BlockFunction block = [&](const at::Tensor& x, State* state) {
      return mixer.forward(x, {}, state);
    };
    std::unique_ptr<State> start = mixer.make_state(2);
    {
      at::NoGradGuard off;
      mixer.forward(at::randn({2, 5, 16}, at::kDouble), {}, start.get());
    }
    const at::Tensor x = at::randn({2, 7, 16}, at::kDouble);
    const auto gradients = [&](bool again) {
      std::unique_ptr<State> state = start->clone();
      TensorMap tensors = state->tensors();
      std::vector<at::Tensor> leaves;
      for (auto& [name, tensor] : tensors) {
        tensor = tensor.detach().clone();
        if (tensor.is_floating_point()) leaves.push_back(tensor.set_requires_grad(true));
      }
      EXPECT_TRUE(state->restore(tensors).ok());
      const at::Tensor y =
          again ? recomputed(block, x, state.get(), mixer.parameters()) : block(x, state.get());
      at::Tensor objective = y.square().sum();
      for (const auto& [name, tensor] : state->tensors())
        if (tensor.requires_grad()) objective = objective + tensor.sin().sum();
      EXPECT_EQ(state->positions(), (std::vector<std::int64_t>{12, 12})) << mechanism->name;
      return torch::autograd::grad({objective}, leaves, {}, {}, false, /*allow_unused=*/true);
    };
    const auto plain = gradients(false), again = gradients(true);
    ASSERT_EQ(plain.size(), again.size());
    for (std::size_t i = 0; i < plain.size(); ++i) {
      ASSERT_EQ(plain[i].defined(), again[i].defined()) << mechanism->name;
      if (!plain[i].defined()) continue;
      EXPECT_LT(test::relative_error(again[i], plain[i]), tolerance::kLayerGradientFloat64)
          << mechanism->name;
    }
  }
}

}  // namespace
}  // namespace everlong
