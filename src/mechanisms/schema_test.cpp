#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include "mechanisms/lightning/op.h"
#include "mechanisms/mechanism.h"
#include "mechanisms/softmax/op.h"

namespace everlong {
namespace {

std::vector<c10::IValue> call(const char* name, std::vector<c10::IValue> arguments) {
  register_torch_operators();
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(arguments);
  return arguments;
}

struct Inputs {
  at::Tensor q = at::randn({2, 9, 4, 8}), k = at::randn({2, 9, 4, 8}), v = at::randn({2, 9, 4, 6});
};

std::vector<c10::IValue> lightning_arguments(const Inputs& in, const char* device) {
  return {in.q.to(at::Device(device)),
          in.k.to(at::Device(device)),
          in.v.to(at::Device(device)),
          std::vector<double>{0.5, 0.25, 0.1, 0},
          0.5,
          std::vector<std::int64_t>{},
          c10::IValue()};
}

TEST(Schema, LightningByNameEqualsTheFunctionAndDifferentiates) {
  Inputs in;
  in.q.requires_grad_();
  const auto results = call("everlong::decay_linear_attention", lightning_arguments(in, "cpu"));
  const auto expected =
      lightning::decay_linear_attention(in.q, in.k, in.v, {{0.5, 0.25, 0.1, 0}, 0.5});
  EXPECT_TRUE(at::equal(results.at(0).toTensor(), expected.o_BTHV));
  EXPECT_TRUE(at::equal(results.at(1).toTensor(), expected.state_NHKV));
  results[0].toTensor().sum().backward();
  EXPECT_GT(in.q.grad().abs().sum().item<double>(), 0);
}

TEST(Schema, LightningOnMetaKnowsItsShapes) {
  const auto results = call("everlong::decay_linear_attention", lightning_arguments({}, "meta"));
  EXPECT_EQ(results.at(0).toTensor().sizes(), at::IntArrayRef({2, 9, 4, 6}));
  EXPECT_EQ(results.at(1).toTensor().sizes(), at::IntArrayRef({2, 4, 8, 6}));
  EXPECT_TRUE(results[1].toTensor().is_meta());
}

TEST(Schema, WhatRidesAlongWithLightningIsEmptyWhereNotWanted) {
  const Inputs in;
  for (const char* device : {"cpu", "meta"})
    for (const bool wanted : {true, false}) {
      auto arguments = lightning_arguments(in, device);
      for (const bool flag : {wanted, wanted, false, wanted, wanted}) arguments.emplace_back(flag);
      const auto results = call("everlong::decay_linear_attention_fused", arguments);
      EXPECT_EQ(results.at(0).toTensor().sizes(), at::IntArrayRef({2, 9, 4, 6}));
      const at::Tensor state = results.at(1).toTensor(), squares = results.at(2).toTensor();
      EXPECT_EQ(state.sizes(), wanted ? at::IntArrayRef({2, 4, 8, 6}) : at::IntArrayRef({0}));
      EXPECT_EQ(squares.sizes(), wanted ? at::IntArrayRef({2, 9, 4}) : at::IntArrayRef({0}));
      if (!wanted || squares.is_meta()) continue;
      const auto expected = lightning::decay_linear_attention(at::silu(in.q), at::silu(in.k), in.v,
                                                              {{0.5, 0.25, 0.1, 0}, 0.5});
      EXPECT_TRUE(at::equal(state, expected.state_NHKV));
      EXPECT_TRUE(at::allclose(squares, expected.o_BTHV.square().sum(-1)));
    }
}

TEST(Schema, SoftmaxByNameEqualsTheFunctionAndKnowsItsShapes) {
  const Inputs in;
  for (const char* device : {"cpu", "meta"}) {
    const auto results =
        call("everlong::causal_attention",
             {in.q.to(at::Device(device)), in.k.to(at::Device(device)), in.v.to(at::Device(device)),
              std::int64_t{3}, c10::IValue(), std::vector<std::int64_t>{}});
    const auto o = results.at(0).toTensor();
    EXPECT_EQ(o.sizes(), at::IntArrayRef({2, 9, 4, 6}));
    if (!o.is_meta()) {
      EXPECT_TRUE(at::equal(o, softmax::attention(in.q, in.k, in.v, {.window = 3})));
    }
  }
}

}  // namespace
}  // namespace everlong
