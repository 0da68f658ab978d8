#include "train/gates.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <numeric>

namespace everlong {
namespace {

std::shared_ptr<Decoder> model(const std::string& mechanism, double start) {
  ModelConfig config;
  config.block = "llama";
  config.hidden_size = 32;
  config.intermediate_size = 32;
  config.layer_types = {"softmax", mechanism, mechanism};
  if (mechanism == "infini")
    config.mechanisms["infini"] = {{"num_heads", 4}, {"segment", 8}, {"gate_init", start}};
  auto made = Decoder::make(config);
  EXPECT_TRUE(made.ok()) << made.status().message();
  return *made;
}

TEST(Gates, AreCountedOverTheLayersThatHaveThem) {
  const auto report = gates_of(*model("infini", 0));
  ASSERT_TRUE(report);
  EXPECT_EQ(report->histogram[5], 8);  // two layers of four heads at 1/2
  EXPECT_EQ(std::accumulate(report->histogram.begin(), report->histogram.end(), 0), 8);
  EXPECT_FALSE(gates_of(*model("softmax", 0)));
}

TEST(Gates, TheAlarmIsForGatesThatDidNotMove) {
  const auto stuck = gates_of(*model("infini", 0));
  EXPECT_FALSE(gate_alarm(*stuck, 999));
  EXPECT_TRUE(gate_alarm(*stuck, 1000));
  GateReport spread = *stuck;
  spread.largest = spread.smallest + 0.03;
  EXPECT_FALSE(gate_alarm(spread, 5000));
}

}  // namespace
}  // namespace everlong
