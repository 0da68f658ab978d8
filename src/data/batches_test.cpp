#include "data/batches.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

namespace everlong {
namespace {

constexpr std::int32_t kEod = 4095;

// 40 documents of 1 to 29 tokens over several shards. A token is its own position in the line, so
// that a row shows where it was cut; ends of documents are kEod.
class Batches : public testing::Test {
 protected:
  Batches() {
    fs::create_directories(folder_);
    SplitWriter writer(folder_, "train", 100);
    for (int document = 0; document < 40; ++document) {
      std::vector<std::int32_t> ids;
      starts_.insert(size());
      for (int i = 0; i < document * 7 % 29; ++i)
        ids.push_back(static_cast<std::int32_t>(size() + i));
      ids.push_back(kEod);
      line_.insert(line_.end(), ids.begin(), ids.end());
      EXPECT_TRUE(writer.add(ids, static_cast<std::int64_t>(ids.size()) - 1).ok());
    }
    EXPECT_TRUE(
        write_dataset_info(folder_, {"test", 4096, kEod, 0, {{"train", *writer.finish()}}}).ok());
  }
  ~Batches() override { fs::remove_all(folder_); }

  SplitView split() { return std::move(TokenDataset::open(folder_)->split("train")).value(); }
  BatchReader reader(const BatchOptions& options) {
    auto made = BatchReader::create(split(), options);
    EXPECT_TRUE(made.ok()) << made.status().message();
    return std::move(made).value();
  }
  std::int64_t size() const { return static_cast<std::int64_t>(line_.size()); }

  // Where in the line a row of at least 3 tokens was cut (no three ends of documents follow each
  // other).
  std::int64_t position_of(const Batch& batch, std::int64_t row) {
    for (std::int64_t i = 0; i < batch.tokens; ++i) {
      const std::int32_t token = batch.inputs[row * batch.tokens + i];
      if (token != kEod) return (token - i + size()) % size();
    }
    ADD_FAILURE() << "a row of ends";
    return 0;
  }

  // Every input, target and boundary of a row against the line.
  void expect_row(const Batch& batch, std::int64_t row, std::int64_t position) {
    const std::set<std::int64_t> found(batch.document_starts.begin(), batch.document_starts.end());
    ASSERT_EQ(found.size(), batch.document_starts.size());
    ASSERT_TRUE(std::is_sorted(batch.document_starts.begin(), batch.document_starts.end()));
    for (std::int64_t i = 0; i < batch.tokens; ++i) {
      const std::int64_t at = row * batch.tokens + i, here = (position + i) % size(),
                         after = (here + 1) % size();
      ASSERT_EQ(batch.inputs[at], line_[here]) << "row " << row << " token " << i;
      ASSERT_EQ(batch.targets[at], starts_.contains(after) ? kNoTarget : line_[after])
          << "row " << row << " token " << i;
      ASSERT_EQ(found.contains(at), i == 0 || starts_.contains(here))
          << "row " << row << " token " << i;
    }
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-batches-", ::getpid());
  std::vector<std::int32_t> line_;
  std::set<std::int64_t> starts_;
};

bool same(const Batch& a, const Batch& b) {
  return a.rows == b.rows && a.tokens == b.tokens && a.inputs == b.inputs &&
         a.targets == b.targets && a.document_starts == b.document_starts &&
         a.row_continues == b.row_continues;
}

TEST_F(Batches, EveryTargetIsTheNextTokenOfItsDocument) {
  for (const Packing packing : {Packing::kPacked, Packing::kShuffled}) {
    for (const BatchOptions& options :
         {BatchOptions{3, 17}, {1, 3}, {4, 64}, {2, 300}, {50, 5}, {1, size()}}) {
      auto batches = reader({options.rows, options.row_tokens, packing, 5});
      Batch batch;
      for (int number = 0; number < 40; ++number) {
        ASSERT_TRUE(batches.next(batch).ok());
        ASSERT_EQ(batch.rows, options.rows);
        ASSERT_EQ(batch.tokens, options.row_tokens);
        ASSERT_EQ(batch.cu_seqlens().back(), options.rows * options.row_tokens);
        for (std::int64_t row = 0; row < batch.rows; ++row)
          expect_row(batch, row, position_of(batch, row));
      }
    }
  }
}

TEST_F(Batches, PackedRowsContinueWhereTheBatchBeforeStopped) {
  for (const BatchOptions& options :
       {BatchOptions{3, 17}, {1, 3}, {4, 64}, {2, 300}, {50, 5}, {1, size()}}) {
    auto batches = reader(options);
    Batch batch;
    ASSERT_TRUE(batches.next(batch).ok());
    EXPECT_EQ(batch.row_continues, std::vector<std::uint8_t>(options.rows, 0));
    std::vector<std::int64_t> expected(options.rows);
    for (std::int64_t row = 0; row < options.rows; ++row) {
      expected[row] = position_of(batch, row);
      EXPECT_EQ(expected[row],
                (expected[0] + row * size() / options.rows) % size());  // spread evenly
    }
    for (int number = 1; number < 60; ++number) {
      ASSERT_TRUE(batches.next(batch).ok());
      for (std::int64_t row = 0; row < options.rows; ++row) {
        expected[row] = (expected[row] + options.row_tokens) % size();
        ASSERT_EQ(position_of(batch, row), expected[row]);
        ASSERT_EQ(batch.row_continues[row] != 0, !starts_.contains(expected[row]));
      }
    }
  }
}

TEST_F(Batches, LengthOfTheRowsDoesNotChangeTheLine) {
  const auto walk = [&](std::int64_t row_tokens) {
    auto batches = reader({1, row_tokens, Packing::kPacked, 3});
    std::vector<std::int32_t> inputs, targets;
    std::vector<std::int64_t>
        fresh;  // where a document begins, told by a boundary or by a row that does not continue
    Batch batch;
    while (static_cast<std::int64_t>(inputs.size()) < 2 * size()) {
      EXPECT_TRUE(batches.next(batch).ok());
      for (const std::int64_t start : batch.document_starts)
        if (start > 0 || !batch.row_continues[0])
          fresh.push_back(start + static_cast<std::int64_t>(inputs.size()));
      inputs.insert(inputs.end(), batch.inputs.begin(), batch.inputs.end());
      targets.insert(targets.end(), batch.targets.begin(), batch.targets.end());
    }
    inputs.resize(2 * size());
    targets.resize(2 * size());
    std::erase_if(fresh, [&](std::int64_t at) { return at >= 2 * size(); });
    return std::tuple(inputs, targets, fresh);
  };
  const auto whole = walk(size());
  for (const std::int64_t row_tokens : {1, 2, 7, 64})
    EXPECT_EQ(walk(row_tokens), whole) << row_tokens;
}

TEST_F(Batches, ShuffledWindowsComeOnceAnEpochInAnotherOrderEachTime) {
  const std::int64_t tokens = 7, windows = size() / tokens;
  auto batches = reader({1, tokens, Packing::kShuffled, 9});
  std::vector<std::vector<std::int64_t>> epochs(3);
  Batch batch;
  for (auto& order : epochs) {
    std::set<std::int32_t> seen;
    for (std::int64_t i = 0; i < windows; ++i) {
      ASSERT_TRUE(batches.next(batch).ok());
      EXPECT_EQ(batch.row_continues[0], 0);
      order.push_back(position_of(batch, 0));
      for (const std::int32_t token : batch.inputs)
        EXPECT_TRUE(token == kEod || seen.insert(token).second) << token << " came twice";
    }
    EXPECT_GT(static_cast<std::int64_t>(seen.size()),
              size() - tokens - 41);  // all but the cut-off and the 40 ends
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NEAR(batches.epochs(), 3, 0.05);
}

TEST_F(Batches, ResumeFromCursorEqualsUninterrupted) {
  for (const Packing packing : {Packing::kPacked, Packing::kShuffled}) {
    const BatchOptions options{4, 13, packing, ~std::uint64_t{0}};
    auto whole = reader(options);
    Batch expected, got;
    for (int number = 0; number < 50; ++number) {
      const auto saved =
          cursor_from_json(nlohmann::json::parse(to_json(whole.cursor()).dump()), "cursor");
      ASSERT_TRUE(saved.ok()) << saved.status().message();
      auto resumed = reader(options);
      ASSERT_TRUE(resumed.seek(*saved).ok());
      ASSERT_TRUE(whole.next(expected).ok());
      ASSERT_TRUE(resumed.next(got).ok());
      ASSERT_TRUE(same(expected, got)) << number;
    }
  }
}

TEST_F(Batches, SeedDecidesEverything) {
  for (const Packing packing : {Packing::kPacked, Packing::kShuffled}) {
    Batch a, b, c;
    auto first = reader({4, 16, packing, 1}), again = reader({4, 16, packing, 1}),
         other = reader({4, 16, packing, 2});
    ASSERT_TRUE(first.next(a).ok() && again.next(b).ok() && other.next(c).ok());
    EXPECT_TRUE(same(a, b));
    EXPECT_FALSE(same(a, c));
  }
}

TEST_F(Batches, CursorOfAnotherRunIsRefused) {
  auto batches = reader({4, 16, Packing::kPacked, 1});
  for (const BatchOptions& other : {BatchOptions{5, 16, Packing::kPacked, 1},
                                    {4, 17, Packing::kPacked, 1},
                                    {4, 16, Packing::kShuffled, 1},
                                    {4, 16, Packing::kPacked, 2}})
    EXPECT_EQ(batches.seek({3, other, size()}).code(), StatusCode::kInvalidArgument);
  EXPECT_NE(batches.seek({3, {4, 16, Packing::kPacked, 1}, size() + 1})
                .message()
                .find("tokens in the data"),
            std::string::npos);
  EXPECT_FALSE(batches.seek({-1, {4, 16, Packing::kPacked, 1}, size()}).ok());
  EXPECT_EQ(batches.cursor().batches, 0);
}

TEST_F(Batches, BrokenCursorIsRefused) {
  const auto good = to_json(reader({4, 16}).cursor());
  ASSERT_TRUE(cursor_from_json(good, "cursor").ok());
  for (const auto& [key, value] : good.items()) {
    auto changed = good;
    changed.erase(key);
    EXPECT_FALSE(cursor_from_json(changed, "cursor").ok()) << "without " << key;
    changed = good;
    changed[key] = -1;
    EXPECT_FALSE(cursor_from_json(changed, "cursor").ok()) << key << " = -1";
    changed[key] = {1};
    EXPECT_FALSE(cursor_from_json(changed, "cursor").ok()) << key << " a list";
  }
  EXPECT_FALSE(cursor_from_json(nlohmann::json("x"), "cursor").ok());
}

TEST_F(Batches, RowLongerThanTheTextIsRefused) {
  EXPECT_NE(
      BatchReader::create(split(), {1, size() + 1}).status().message().find("smaller row_tokens"),
      std::string::npos);
  EXPECT_FALSE(BatchReader::create(split(), {0, 8}).ok());
  EXPECT_FALSE(BatchReader::create(split(), {1, 0}).ok());
}

TEST_F(Batches, SequentialReaderReadsEverythingOnceInOrder) {
  for (const std::int64_t row_tokens : {1, 2, 50, 64, 100000}) {
    for (const std::int64_t limit :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{101}, size(), size() + 5}) {
      const std::int64_t end = limit == 0 ? size() : std::min(limit, size());
      SequentialReader sequential(split(), row_tokens, limit);
      EXPECT_EQ(sequential.tokens(), end);
      std::int64_t at = 0;
      Batch batch;
      for (;;) {
        const auto more = sequential.next(batch);
        ASSERT_TRUE(more.ok());
        if (!*more) break;
        EXPECT_EQ(batch.rows, 1);
        EXPECT_EQ(batch.row_continues[0] == 0, starts_.contains(at));
        expect_row(batch, 0, at);
        at += batch.tokens;
        EXPECT_EQ(sequential.position(), at);
      }
      EXPECT_EQ(at, end);
    }
  }
}

TEST_F(Batches, PredictionsLeaveOutTheFirstTokenOfEveryDocument) {
  SequentialReader sequential(split(), size());
  Batch batch;
  ASSERT_TRUE(*sequential.next(batch));
  EXPECT_EQ(batch.predictions(), size() - 40);
}

}  // namespace
}  // namespace everlong
