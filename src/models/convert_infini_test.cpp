#include "models/convert_infini.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "models/convert.h"
#include "models/weight_reader.h"
#include "support/published_folders.h"

namespace everlong {
namespace {

using nlohmann::json;
using test::made;
using test::publish;
using test::published_configs;
using test::TemporaryFolder;

json llama() {
  for (const json& config : published_configs())
    if (config.value("model_type", "") == "llama") return config;
  ADD_FAILURE() << "no llama among the published configs";
  return {};
}

TEST(ConvertInfini, UpToOneSegmentTheNumbersAreTheSameBitForBit) {
  const TemporaryFolder folder("convert_infini");
  const auto model = publish(made(folder, "in"), llama());
  ConvertOptions options;
  options.infini = json{{"segment", 24}, {"update", "delta"}};
  const auto report = convert_model(folder / "in", made(folder, "out"), options);
  ASSERT_TRUE(report.ok()) << report.status().message();
  const auto loaded = load_model(folder / "out", at::kCPU, at::kFloat);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  Decoder& infini = **loaded;
  for (const auto& type : infini.config().layer_types) EXPECT_EQ(type, "infini");

  const at::NoGradGuard no_grad;
  at::manual_seed(4);
  const at::Tensor tokens = at::randint(model->config().vocab_size, {2, 40}, at::kLong);
  const auto logits = [&](Decoder& of, std::int64_t count) {
    return of.logits(of.hidden(tokens.narrow(1, 0, count), {}, nullptr));
  };
  for (const std::int64_t count : {1, 11, 24})
    EXPECT_TRUE(at::equal(logits(infini, count), logits(*model, count))) << count << " tokens";
  EXPECT_FALSE(at::equal(logits(infini, 40), logits(*model, 40)));
  // Gates are new, and where a conversion leaves them.
  for (const auto& [name, x] : parameters_of(infini))
    if (name.ends_with(".gate")) {
      EXPECT_TRUE(at::equal(x, at::full_like(x, kConvertedGateInit))) << name;
    }
}

TEST(ConvertInfini, WhatCannotBecomeOneIsRefused) {
  ModelConfig config;
  config.layer_types = {"lightning", "lightning"};
  EXPECT_FALSE(with_infini_layers(config, json::object()).ok());
  config.layer_types = {"softmax", "lightning"};
  ASSERT_TRUE(with_infini_layers(config, json::object()).ok());
  EXPECT_EQ(with_infini_layers(config, json::object())->layer_types.front(), "infini");
  config.mechanisms["softmax"] = {{"window", 16}};
  EXPECT_FALSE(with_infini_layers(config, json::object()).ok());
  config.mechanisms["softmax"] = {{"head_dim", 8}, {"rotary_dim", 4}};
  EXPECT_FALSE(with_infini_layers(config, json::object()).ok());
  const TemporaryFolder folder("convert_infini_hf");
  publish(made(folder, "in"), llama());
  ConvertOptions options;
  options.infini = json::object();
  options.to = "hf";
  EXPECT_FALSE(convert_model(folder / "in", made(folder, "out"), options).ok());
}

}  // namespace
}  // namespace everlong
