#include "data/dataset.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace everlong {
namespace {

// Documents of lengths 3, 1, 4, 2, 9, 2 (the eod, 256, included) over shards of at most 6 tokens.
class Dataset : public testing::Test {
 protected:
  Dataset() {
    fs::create_directories(folder_);
    SplitWriter writer(folder_, "train", 6);
    std::int32_t next = 0;
    for (const int length : {3, 1, 4, 2, 9, 2}) {
      std::vector<std::int32_t> ids;
      for (int i = 0; i + 1 < length; ++i) ids.push_back(next++);
      ids.push_back(256);
      line_.insert(line_.end(), ids.begin(), ids.end());
      EXPECT_TRUE(writer.add(ids, length - 1).ok());
      starts_.push_back(static_cast<std::int64_t>(line_.size()));
    }
    auto split = writer.finish();
    EXPECT_TRUE(split.ok()) << split.status().message();
    info_ = {"bytes", 259, 256, 0.1, {{"train", *split}}};
    EXPECT_TRUE(write_dataset_info(folder_, info_).ok());
  }
  ~Dataset() override { fs::remove_all(folder_); }

  std::string json() { return std::move(read_file(folder_ / kDatasetFile)).value(); }
  // The failure of opening the dataset with `from` in dataset.json replaced.
  Status opened_with(std::string_view from, std::string_view to) {
    std::string text = json();
    const auto at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    const std::string before = json();
    std::ofstream(folder_ / kDatasetFile) << text;
    const Status status = TokenDataset::open(folder_).status();
    std::ofstream(folder_ / kDatasetFile) << before;
    return status;
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-dataset-", ::getpid());
  std::vector<std::int32_t> line_;
  std::vector<std::int64_t> starts_ = {0};
  DatasetInfo info_;
};

TEST_F(Dataset, WholeDocumentsFillTheShards) {
  const auto info = read_dataset_info(folder_);
  ASSERT_TRUE(info.ok()) << info.status().message();
  const SplitInfo& train = info->splits.at("train");
  ASSERT_EQ(train.shards.size(), 4u);  // 3+1, 4+2, 9 (longer than a shard should be), 2
  EXPECT_EQ(train.shards[0].file, "train-00000.tokens");
  EXPECT_EQ(train.shards[2].file, "train-00002.tokens");
  EXPECT_EQ(train.shards[1].tokens, 6);
  EXPECT_EQ(train.shards[2].tokens, 9);
  EXPECT_EQ(train.tokens, 21);
  EXPECT_EQ(train.documents, 6);
  EXPECT_EQ(train.bytes, 15);
  EXPECT_EQ(info->tokenizer, "bytes");
  EXPECT_EQ(info->eod, 256);
}

TEST_F(Dataset, EveryRangeReadsAcrossShards) {
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok()) << dataset.status().message();
  EXPECT_TRUE(dataset->verify().ok());
  const auto train = dataset->split("train");
  ASSERT_TRUE(train.ok());
  ASSERT_EQ(train->tokens(), static_cast<std::int64_t>(line_.size()));
  for (std::size_t begin = 0; begin < line_.size(); ++begin) {
    for (std::size_t end = begin; end <= line_.size(); ++end) {
      std::vector<std::int32_t> got(end - begin, -1);
      ASSERT_TRUE(train->read(static_cast<std::int64_t>(begin), got).ok());
      EXPECT_EQ(got, std::vector(line_.begin() + begin, line_.begin() + end))
          << begin << " to " << end;
    }
  }
}

TEST_F(Dataset, DocumentsAreFoundFromBothSides) {
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok());
  const auto train = dataset->split("train");
  ASSERT_TRUE(train.ok());
  for (std::int64_t i = 0; i <= train->documents(); ++i)
    EXPECT_EQ(train->document_start(i), starts_[i]);
  for (std::int64_t i = 0; i < train->documents(); ++i)
    for (std::int64_t at = starts_[i]; at < starts_[i + 1]; ++at)
      EXPECT_EQ(train->document_at(at), i) << at;
}

TEST_F(Dataset, ViewOutlivesTheDataset) {
  auto train = [&] { return std::move(TokenDataset::open(folder_)->split("train")).value(); }();
  std::vector<std::int32_t> got(line_.size());
  ASSERT_TRUE(train.read(0, got).ok());
  EXPECT_EQ(got, line_);
}

TEST_F(Dataset, MissingDatasetAndSplitSayWhatToDo) {
  EXPECT_NE(
      TokenDataset::open(folder_ / "nowhere").status().message().find("everlong data prepare"),
      std::string::npos);
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok());
  EXPECT_NE(dataset->split("test").status().message().find("it has: train"), std::string::npos);
}

TEST_F(Dataset, InfoThatDisagreesIsRefused) {
  EXPECT_TRUE(opened_with("bytes", "bytes").ok());
  EXPECT_EQ(opened_with("everlong-tokens-1", "everlong-tokens-2").code(), StatusCode::kUnsupported);
  EXPECT_FALSE(opened_with("\"documents\": 6,", "\"documents\": 7,").ok());
  EXPECT_FALSE(opened_with("\"tokens\": 21", "\"tokens\": 20").ok());
  EXPECT_FALSE(opened_with("train-00001.tokens", "train-00002.tokens").ok());
  EXPECT_FALSE(opened_with("train-00001.tokens", "train-00009.tokens").ok());
  EXPECT_FALSE(opened_with("\"vocab_size\": 259", "\"vocab_size\": 256").ok());
  EXPECT_FALSE(opened_with("\"vocab_size\": 259", "\"vocab_size\": 65537").ok());
  EXPECT_FALSE(opened_with("\"eod\"", "\"eos\"").ok());
  EXPECT_FALSE(opened_with("\"splits\": {", "\"splits\": [").ok());
  EXPECT_FALSE(opened_with("{", "[").ok());
}

TEST_F(Dataset, ShardOutsideTheFolderIsNotOpened) {
  fs::create_directories(folder_ / "sub");
  fs::copy_file(folder_ / "train-00001.tokens", folder_ / "sub/train-00001.tokens");
  EXPECT_NE(
      opened_with("train-00001.tokens", "sub/train-00001.tokens").message().find("plain file name"),
      std::string::npos);
}

TEST_F(Dataset, ShardThatHoldsAnotherCountIsRefused) {
  for (const int tokens : {0, 1}) {
    DatasetInfo changed = info_;
    auto& train = changed.splits["train"];
    (tokens ? train.tokens : train.documents) -= 1;
    (tokens ? train.shards[1].tokens : train.shards[1].documents) -= 1;
    ASSERT_TRUE(write_dataset_info(folder_, changed).ok());
    EXPECT_NE(TokenDataset::open(folder_).status().message().find(
                  "train-00001.tokens: holds 6 tokens in 2"),
              std::string::npos);
  }
}

TEST_F(Dataset, TokensOutsideTheVocabularyAreNotHandedOut) {
  info_.vocab_size = 257;
  ASSERT_TRUE(write_dataset_info(folder_, info_).ok());
  EXPECT_TRUE(TokenDataset::open(folder_)->verify().ok());
  SplitWriter writer(folder_, "train", 100);
  ASSERT_TRUE(writer.add(std::vector<std::int32_t>{1, 2, 257, 256}, 3).ok());
  info_.splits["train"] = std::move(writer.finish()).value();
  ASSERT_TRUE(write_dataset_info(folder_, info_).ok());
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok());
  EXPECT_EQ(dataset->verify().code(), StatusCode::kCorrupt);
  std::vector<std::int32_t> got(2);
  EXPECT_TRUE(dataset->split("train")->read(0, got).ok());
  EXPECT_EQ(dataset->split("train")->read(1, got).code(), StatusCode::kCorrupt);
}

TEST_F(Dataset, VerifyFindsADocumentWithoutItsEnd) {
  SplitWriter writer(folder_, "train", 100);
  ASSERT_TRUE(writer.add(std::vector<std::int32_t>{1, 2, 256}, 2).ok());
  ASSERT_TRUE(writer.add(std::vector<std::int32_t>{1, 2, 3}, 3).ok());
  info_.splits["train"] = std::move(writer.finish()).value();
  ASSERT_TRUE(write_dataset_info(folder_, info_).ok());
  EXPECT_NE(TokenDataset::open(folder_)->verify().message().find(
                "document 1 does not end with token 256"),
            std::string::npos);
}

}  // namespace
}  // namespace everlong
