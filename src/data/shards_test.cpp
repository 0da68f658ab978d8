#include "data/shards.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

namespace everlong {
namespace {

class ShardFile : public testing::Test {
 protected:
  ShardFile() { fs::create_directories(folder_); }
  ~ShardFile() override { fs::remove_all(folder_); }

  fs::path write(std::size_t tokens, std::vector<std::uint64_t> starts) {
    std::vector<std::uint16_t> ids(tokens);
    for (std::size_t i = 0; i < tokens; ++i) ids[i] = static_cast<std::uint16_t>(i * 7919);
    const Status status = write_shard(path_, ids, starts);
    EXPECT_TRUE(status.ok()) << status.message();
    return path_;
  }
  // Opens and verifies `bytes` as a shard: the first failure, or ok.
  Status check(std::string_view bytes) {
    std::ofstream(path_, std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    EVERLONG_ASSIGN(const Shard shard, Shard::open(path_));
    return shard.verify();
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-shards-", ::getpid());
  const fs::path path_ = folder_ / "x.tokens";
};

TEST_F(ShardFile, ReadsWhatWasWritten) {
  for (const std::size_t tokens : {1, 2, 3, 4, 5, 1000}) {  // every padding
    std::vector<std::uint64_t> starts = {0};
    for (std::uint64_t at = 1; at < tokens; at *= 3) starts.push_back(at);
    starts.push_back(tokens);
    const auto shard = Shard::open(write(tokens, starts));
    ASSERT_TRUE(shard.ok()) << shard.status().message();
    ASSERT_EQ(shard->tokens().size(), tokens);
    for (std::size_t i = 0; i < tokens; ++i)
      EXPECT_EQ(shard->tokens()[i], static_cast<std::uint16_t>(i * 7919));
    EXPECT_EQ(std::vector(shard->document_starts().begin(), shard->document_starts().end()),
              starts);
    EXPECT_EQ(shard->documents(), static_cast<std::int64_t>(starts.size()) - 1);
    EXPECT_TRUE(shard->verify().ok());
  }
}

TEST_F(ShardFile, LayoutIsTheDocumentedOne) {
  const auto text = read_file(write(3, {0, 2, 3}));
  ASSERT_TRUE(text.ok());
  ASSERT_EQ(text->size(), 32u + 6 + 2 + 3 * 8 + 8);
  const auto number = [&](std::size_t at, std::size_t bytes) {
    std::uint64_t value = 0;
    for (std::size_t i = bytes; i-- > 0;)
      value = value << 8 | static_cast<unsigned char>((*text)[at + i]);
    return value;
  };
  EXPECT_EQ(text->substr(0, 8), std::string("EVLTOK1\0", 8));
  EXPECT_EQ(number(8, 4), 1u);
  EXPECT_EQ(number(12, 4), 2u);
  EXPECT_EQ(number(16, 8), 3u);
  EXPECT_EQ(number(24, 8), 2u);
  EXPECT_EQ(number(34, 2), 7919u);
  EXPECT_EQ(number(38, 2), 0u);
  EXPECT_EQ(number(40 + 8, 8), 2u);
  EXPECT_EQ(number(40 + 16, 8), 3u);
}

TEST_F(ShardFile, PaddingIsTheLeastThatAligns) {
  for (const auto& [tokens, padding] :
       {std::pair<std::size_t, std::size_t>{1, 6}, {2, 4}, {3, 2}, {4, 0}, {8, 0}})
    EXPECT_EQ(fs::file_size(write(tokens, {0, tokens})), 32 + 2 * tokens + padding + 2 * 8 + 8);
}

TEST_F(ShardFile, EveryTruncationIsRefused) {
  const auto text = read_file(write(37, {0, 5, 6, 37}));
  ASSERT_TRUE(text.ok());
  for (std::size_t size = 0; size < text->size(); ++size)
    EXPECT_EQ(check(text->substr(0, size)).code(), StatusCode::kCorrupt) << size << " bytes";
  // Also by open() alone, which does not read the tokens.
  for (const std::string_view extra : {"x", "12345678"}) {
    EXPECT_EQ(check(cat(*text, extra)).code(), StatusCode::kCorrupt);
    EXPECT_FALSE(Shard::open(path_).ok());
  }
  EXPECT_FALSE(check(text->substr(0, text->size() - 8)).ok());
  EXPECT_FALSE(Shard::open(path_).ok());
  EXPECT_EQ(check(*text + std::string(16, '\0')).code(), StatusCode::kCorrupt);
  EXPECT_TRUE(check(*text).ok());
}

TEST_F(ShardFile, EveryFlippedBitIsFound) {
  const auto text = read_file(write(37, {0, 5, 6, 37}));
  ASSERT_TRUE(text.ok());
  for (std::size_t at = 0; at < text->size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = *text;
      changed[at] = static_cast<char>(changed[at] ^ (1 << bit));
      EXPECT_FALSE(check(changed).ok()) << "byte " << at << " bit " << bit;
    }
  }
}

TEST_F(ShardFile, ImpossibleCountsAreRefusedBeforeAnythingIsRead) {
  const auto text = read_file(write(8, {0, 8}));
  ASSERT_TRUE(text.ok());
  // Sizes that overflow when multiplied, and a matching-looking file size through wrap-around.
  for (const std::uint64_t claimed :
       {~0ull, 1ull << 63, (1ull << 63) + 8, 1ull << 62, 1ull << 29}) {
    for (const std::size_t field : {16, 24}) {
      std::string changed = *text;
      std::memcpy(changed.data() + field, &claimed, 8);
      const Status status = check(changed);
      EXPECT_EQ(status.code(), StatusCode::kCorrupt);
      EXPECT_NE(status.message().find("x.tokens: claims"), std::string::npos) << status.message();
    }
  }
}

TEST_F(ShardFile, OtherVersionsSaySo) {
  auto text = read_file(write(8, {0, 8}));
  ASSERT_TRUE(text.ok());
  (*text)[8] = 2;
  EXPECT_EQ(check(*text).code(), StatusCode::kUnsupported);
  EXPECT_NE(check(*text).message().find("version 2; this program reads version 1"),
            std::string::npos);
}

TEST_F(ShardFile, WriterRefusesDocumentsThatDoNotCoverTheTokens) {
  const std::vector<std::uint16_t> ids(10);
  for (const std::vector<std::uint64_t>& starts : {std::vector<std::uint64_t>{},
                                                   {0},
                                                   {0, 9},
                                                   {1, 10},
                                                   {0, 5, 5, 10},
                                                   {0, 6, 5, 10},
                                                   {0, 11}}) {
    EXPECT_EQ(write_shard(path_, ids, starts).code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(fs::exists(path_));
  }
}

}  // namespace
}  // namespace everlong
