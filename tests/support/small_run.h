// A dataset that trains in a moment, and the run file for it.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "core/json_lines.h"
#include "data/dataset.h"
#include "support/small_models.h"
#include "train/run_file.h"

namespace everlong::test {

inline constexpr std::int64_t kLetters = 16;
inline constexpr std::int32_t kEndOfDocument = 256;

// Documents that copy themselves: two random letters, over and over, "fkfkfk...". Whoever looks
// only at the last letter loses ln 16 = 2.77 nats a letter, whoever remembers the one before nearly
// none.
inline void write_dataset(const fs::path& folder) {
  std::mt19937 random(1);
  DatasetInfo info{.tokenizer = "bytes",
                   .vocab_size = 259,
                   .eod = kEndOfDocument,
                   .valid_fraction = 0.1,
                   .splits = {}};
  for (const auto& [name, documents] : {std::pair("train", 200), std::pair("valid", 20)}) {
    SplitWriter writer(folder, name, 1 << 20);
    for (int d = 0; d < documents; ++d) {
      std::vector<std::int32_t> ids;
      const std::int32_t pair[] = {static_cast<std::int32_t>(random() % kLetters),
                                   static_cast<std::int32_t>(random() % kLetters)};
      for (int i = 0; i < 60; ++i) ids.insert(ids.end(), std::begin(pair), std::end(pair));
      ids.push_back(kEndOfDocument);
      ASSERT_TRUE(writer.add(ids, 120).ok());
    }
    auto split = writer.finish();
    ASSERT_TRUE(split.ok());
    info.splits[name] = *split;
  }
  ASSERT_TRUE(write_dataset_info(folder, info).ok());
}

class TrainingTest : public testing::Test {
 protected:
  void SetUp() override { write_dataset(folder_.path()); }

  RunFile run_file(const std::vector<std::string>& overrides = {}) {
    auto run = RunFile::parse(R"(
[model]
hidden_size = 32
intermediate_size = 64
layer_types = ["lightning", "lightning"]
[model.lightning]
num_heads = 2
head_dim = 16
[data]
path = "replaced"
row_tokens = 64
rows = 8
[train]
steps = 20
learning_rate = 1e-2
warmup_steps = 5
weight_decay = 0.01
threads = 1
device = "cpu"
)",
                              "test.toml", overrides);
    EXPECT_TRUE(run.ok()) << run.status().message();
    run->data.path = folder_.path().string();
    run->out.folder = (folder_.path() / "run").string();
    return *run;
  }

  fs::path out() const { return folder_.path() / "run"; }

  std::vector<nlohmann::json> log() const {
    const auto text = read_file(out() / "log.jsonl");
    if (!text.ok()) return {};
    const auto read = parse_json_lines(*text);
    EXPECT_EQ(read.passed_over, 0);
    return {read.lines.begin(), read.lines.end()};
  }

  TemporaryFolder folder_{"train"};
};

}  // namespace everlong::test
