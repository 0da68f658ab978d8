#include "train/run_file.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

constexpr const char* kRun = R"(# a run
[model]
block = "transnormer"
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 4
layer_types = "lightning*3,softmax"

[model.softmax]
num_heads = 2

[data]
path = "data/text"
row_tokens = 128

[train]
steps = 300
learning_rate = 1e-3
)";

std::string refusal(const std::string& toml, const std::vector<std::string>& overrides = {}) {
  const auto run = RunFile::parse(toml, "run.toml", overrides);
  return run.ok() ? "accepted" : run.status().message();
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

void expect_has(const std::string& message, const std::vector<std::string>& parts) {
  for (const auto& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\n  lacks: " << part;
}

TEST(RunFile, ReadsValuesAndKeepsDefaults) {
  const auto run = RunFile::parse(kRun, "run.toml", {});
  ASSERT_TRUE(run.ok()) << run.status().message();
  EXPECT_EQ(run->model.hidden_size, 64);
  EXPECT_EQ(run->model.layer_types,
            (std::vector<std::string>{"lightning", "lightning", "lightning", "softmax"}));
  EXPECT_EQ(run->model.mechanisms.at("softmax").at("num_heads"), 2);
  EXPECT_EQ(run->data.path, "data/text");
  EXPECT_EQ(run->data.row_tokens, 128);
  EXPECT_EQ(run->data.rows, DataSettings().rows);
  EXPECT_EQ(run->train.steps, 300);
  EXPECT_EQ(run->train.learning_rate, 1e-3);
  EXPECT_EQ(run->train.schedule, "cosine");
}

TEST(RunFile, OverridesReplaceTomlTextAndCounts) {
  const auto run =
      RunFile::parse(kRun, "run.toml",
                     {"train.steps=500", "train.eval_tokens=1K", "train.checkpointing=true",
                      "train.schedule=wsd", "data.path=other/data-1", "out.folder=runs/x",
                      "model.softmax.num_heads=4", "train.learning_rate=2"});
  ASSERT_TRUE(run.ok()) << run.status().message();
  EXPECT_EQ(run->train.steps, 500);
  EXPECT_EQ(run->train.eval_tokens, 1024);
  EXPECT_TRUE(run->train.checkpointing);
  EXPECT_EQ(run->train.schedule, "wsd");
  EXPECT_EQ(run->data.path, "other/data-1");
  EXPECT_EQ(run->out.folder, "runs/x");
  EXPECT_EQ(run->model.mechanisms.at("softmax").at("num_heads"), 4);
  EXPECT_EQ(run->train.learning_rate, 2.0);
}

TEST(RunFile, UnknownKeysAreRefusedWithFileLineAndGuess) {
  expect_has(refusal(replaced(kRun, "steps = 300", "stps = 300")),
             {"run.toml:17:", "train.stps", "\"steps\""});
  expect_has(refusal(replaced(kRun, "[train]", "[tran]")),
             {"run.toml:16:", "tran is not a section", "\"train\""});
  expect_has(refusal(replaced(kRun, "hidden_size", "hiden_size")),
             {"run.toml:4:", "hiden_size", "\"hidden_size\""});
  expect_has(refusal(kRun, {"train.sead=3"}), {"--set train.sead=3", "\"seed\""});
  expect_has(refusal(kRun, {"tran.seed=3"}), {"--set tran.seed=3", "\"train\""});
}

TEST(RunFile, WrongTypesAndValuesAreRefusedWithFileAndLine) {
  expect_has(refusal(replaced(kRun, "steps = 300", "steps = 3.5")),
             {"run.toml:17:", "train.steps = 3.5", "whole number from 1"});
  expect_has(refusal(replaced(kRun, "steps = 300", "steps = 0")),
             {"run.toml:17:", "whole number from 1"});
  expect_has(refusal(replaced(kRun, "1e-3", "\"fast\"")),
             {"run.toml:18:", "fast", "a number from 0"});
  expect_has(refusal(replaced(kRun, "\"data/text\"", "5")),
             {"run.toml:13:", "data.path = 5", "a text is needed"});
  expect_has(refusal(kRun, {"train.checkpointing=1"}),
             {"--set train.checkpointing=1", "true or false"});
  expect_has(refusal(kRun, {"train.schedule=cosin"}),
             {"one of: cosine, wsd, constant", "\"cosine\""});
  expect_has(refusal(replaced(kRun, "hidden_size = 64", "hidden_size = \"big\"")),
             {"run.toml:4:", "hidden_size"});
  expect_has(refusal(replaced(kRun, "[train]", "[train")), {"run.toml:16:", "not TOML"});
  expect_has(refusal("train = 5\n"), {"run.toml:1:", "[train] opens a section"});
  expect_has(refusal(kRun, {"train.steps"}), {"--set train.steps", "section.key=value"});
  expect_has(refusal(kRun, {"train.steps.more=1"}), {"steps is a value, not a section"});
}

TEST(RunFile, WhatDoesNotFitTogetherIsRefused) {
  expect_has(refusal(replaced(kRun, "path = \"data/text\"", "")), {"data.path is missing"});
  expect_has(refusal(kRun, {"train.warmup_steps=300"}), {"warmup_steps = 300"});
  expect_has(refusal(kRun, {"train.segment_tokens=64"}), {"segment_tokens = 64", "detached"});
  expect_has(refusal(kRun, {"train.carry=exact"}), {"segment_tokens below"});
  expect_has(refusal(kRun, {"train.carry=detached", "data.packing=shuffled"}),
             {"nothing to carry"});
  expect_has(refusal(kRun, {"train.from_model=runs/a/model"}),
             {"run.toml:2:", "exclude each other"});
  expect_has(refusal("[data]\npath = \"x\"\n"), {"[model] is missing"});
}

TEST(RunFile, EffectiveFileReadsBackToTheSameRun) {
  const auto run =
      RunFile::parse(kRun, "run.toml", {"train.eps=1e-9", "train.seed=7", "out.folder=a \"b\""});
  ASSERT_TRUE(run.ok()) << run.status().message();
  const std::string written = run->to_toml();
  const auto again = RunFile::parse(written, "again.toml", {});
  ASSERT_TRUE(again.ok()) << again.status().message() << "\n" << written;
  EXPECT_EQ(again->to_toml(), written);
  EXPECT_EQ(again->train.eps, 1e-9);
  EXPECT_EQ(again->out.folder, "a \"b\"");
  EXPECT_EQ(again->model.to_json(), run->model.to_json());
  expect_has(written, {"log_every = 1", "beta2 = 0.95"});  // defaults too
}

TEST(RunFile, LayerPatternsRepeatToTheNumberOfLayers) {
  const auto expand = [](const std::string& pattern, std::int64_t layers) {
    const auto list = expand_layer_pattern(pattern, layers);
    return list.ok() ? join(*list, " ") : list.status().message();
  };
  EXPECT_EQ(expand("a*2, b", 0), "a a b");
  EXPECT_EQ(expand("a*2,b", 7), "a a b a a b a");
  EXPECT_EQ(expand("a", 1), "a");
  expect_has(expand("a*x", 2), {"does not say how often"});
  expect_has(expand("a,,b", 2), {"name is missing"});
  expect_has(expand("", 2), {"name is missing"});
}

}  // namespace
}  // namespace everlong
