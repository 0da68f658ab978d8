#include "eval/attention_reach.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace everlong {
namespace {

ModelConfig model(const std::string& mechanism, std::int64_t layers, nlohmann::json settings) {
  ModelConfig config;
  config.block = "llama";
  config.hidden_size = 64;
  config.layer_types.assign(static_cast<std::size_t>(layers), mechanism);
  settings["num_heads"] = 4;
  config.mechanisms[mechanism] = std::move(settings);
  return config;
}

std::vector<std::int64_t> layers_from(const ModelConfig& config, std::int64_t place,
                                      std::int64_t tokens) {
  const auto reach = AttentionReach::of(config);
  EXPECT_TRUE(reach.ok()) << reach.status().message();
  return reach.ok() ? reach->layers_from(place, tokens) : std::vector<std::int64_t>();
}

TEST(AttentionReach, AWindowAddsItselfPerLayer) {
  const auto passed = layers_from(model("softmax", 2, {{"window", 4}}), 2, 12);
  EXPECT_EQ(passed, (std::vector<std::int64_t>{-1, -1, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1}));
}

// By hand, two heads' worth of key/value heads: segments of 2 seen whole, and of 8 by every second
// position. From 1: its neighbour is none (the segment ends), its lattice is 3, 5, 7 (head 1); then
// their segments give nothing new to the right but what the lattices reach.
TEST(AttentionReach, LatticesByHand) {
  auto config = model("longnet", 2,
                      {{"num_kv_heads", 2}, {"segment_length", {2, 8}}, {"dilated_ratio", {1, 2}}});
  EXPECT_EQ(layers_from(config, 1, 10),
            (std::vector<std::int64_t>{-1, 0, -1, 1, -1, 1, -1, 1, -1, -1}));
  // From 0: itself, then 1 (segment of 2), and 2, 4, 6 (head 0); with two layers all up to 7.
  EXPECT_EQ(layers_from(config, 0, 10),
            (std::vector<std::int64_t>{0, 1, 1, 2, 1, 2, 1, 2, -1, -1}));
  // One key/value head has the even lattice alone.
  config.mechanisms["longnet"]["num_kv_heads"] = 1;
  EXPECT_EQ(layers_from(config, 1, 10),
            (std::vector<std::int64_t>{-1, 0, -1, -1, -1, -1, -1, -1, -1, -1}));
  // A pattern that comes in at position 2 serves all of these queries but position 1's.
  config.mechanisms["longnet"] = {{"num_heads", 4},
                                  {"num_kv_heads", 1},
                                  {"segment_length", {2, 8}},
                                  {"dilated_ratio", {1, 1}},
                                  {"beyond", "grow"}};
  config.layer_types.resize(1);
  EXPECT_EQ(layers_from(config, 0, 10),
            (std::vector<std::int64_t>{0, 1, 1, 1, 1, 1, 1, 1, -1, -1}));
}

// The share of (symbol, question) pairs that the recipe's specification states, from its own
// program: symbols at 0 .. 191, questions at all later places with equal odds for each document.
TEST(AttentionReach, TheRecipesShares) {
  const auto share = [](std::int64_t layers, std::int64_t kv_heads) {
    const auto reach = AttentionReach::of(model("longnet", layers,
                                                {{"num_kv_heads", kv_heads},
                                                 {"segment_length", {16, 64, 256}},
                                                 {"dilated_ratio", {1, 2, 4}}}));
    double connected = 0, all = 0;
    for (std::int64_t place = 0; place < 192; ++place) {
      const auto passed = reach->layers_from(place, 256);
      for (std::int64_t at = place + 1; at < 256; ++at, ++all)
        connected += passed[static_cast<std::size_t>(at)] > 0 ? 1 : 0;
    }
    return connected / all;
  };
  EXPECT_NEAR(share(1, 4), 0.323, 0.01);
  EXPECT_NEAR(share(2, 4), 0.986, 0.01);
  EXPECT_NEAR(share(2, 1), 0.478, 0.02);
}

TEST(AttentionReach, OtherMechanismsAreRefused) {
  const auto reach = AttentionReach::of(model("lightning", 1, nlohmann::json::object()));
  ASSERT_FALSE(reach.ok());
  EXPECT_EQ(reach.status().code(), StatusCode::kUnsupported);
  EXPECT_NE(reach.status().message().find("lightning"), std::string::npos);
}

}  // namespace
}  // namespace everlong
