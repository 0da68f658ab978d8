#include "data/batches.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
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

TEST_F(Batches, RowsOfDocumentsHoldEachOneWholeAndOnceAnEpoch) {
  for (const BatchOptions& options : {BatchOptions{3, 29}, {1, 64}, {2, 400}, {7, 33}}) {
    auto batches = reader({options.rows, options.row_tokens, Packing::kDocuments, 5});
    EXPECT_EQ(batches.epochs(), 0);
    Batch batch;
    std::vector<std::int64_t> first_epoch, all;  // where the documents begin in the line
    while (batches.epochs() < 3) {
      ASSERT_TRUE(batches.next(batch).ok());
      ASSERT_EQ(batch.rows, options.rows);
      ASSERT_EQ(std::ssize(batch.inputs), options.rows * options.row_tokens);
      EXPECT_EQ(batch.row_continues, std::vector<std::uint8_t>(options.rows, 0));
      const auto offsets = batch.cu_seqlens();
      std::set<std::int64_t> begins(offsets.begin(), offsets.end());
      for (std::int64_t row = 0; row <= options.rows; ++row)
        EXPECT_TRUE(begins.contains(row * options.row_tokens));
      for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
        const auto begin = offsets[n], end = offsets[n + 1];
        const bool padding = begin % options.row_tokens != 0 && end % options.row_tokens == 0 &&
                             std::ranges::count(std::span(batch.inputs).subspan(begin, end - begin),
                                                kEod) == end - begin &&
                             batch.inputs[begin - 1] == kEod;
        for (auto at = begin; at < end; ++at) {
          const bool last = at + 1 == end;
          EXPECT_EQ(batch.targets[at], last || padding ? kNoTarget : batch.inputs[at + 1]);
          EXPECT_EQ(batch.inputs[at] == kEod, last || padding);
        }
        if (end - begin == 1) continue;  // an empty document, or one token of padding
        if (padding) continue;
        EXPECT_TRUE(starts_.contains(batch.inputs[begin]));
        all.push_back(batch.inputs[begin]);
      }
    }
    std::map<std::int64_t, int> times;
    for (const auto begin : all) ++times[begin];
    std::int64_t longer = 0;  // documents of more than their end
    for (int document = 0; document < 40; ++document) longer += document * 7 % 29 > 0 ? 1 : 0;
    EXPECT_EQ(std::ssize(times), longer);
    // The last batch may have begun the next epoch.
    for (const auto& [begin, count] : times) EXPECT_TRUE(count == 3 || count == 4) << begin;
    EXPECT_FALSE(std::equal(all.begin(), all.begin() + longer, all.begin() + longer));
  }
}

TEST_F(Batches, RowsOfDocumentsGoOnExactlyWhereTheyStopped) {
  const BatchOptions options{2, 40, Packing::kDocuments, 3};
  auto whole = reader(options);
  Batch expected, batch;
  for (int i = 0; i < 30; ++i) {
    auto resumed = reader(options);
    ASSERT_TRUE(resumed.seek(whole.cursor()).ok());
    ASSERT_TRUE(whole.next(expected).ok());
    ASSERT_TRUE(resumed.next(batch).ok());
    EXPECT_TRUE(same(expected, batch)) << i;
  }
  ASSERT_TRUE(whole.seek({1, options, size()}).ok());  // and back
  auto second = reader(options);
  ASSERT_TRUE(second.next(batch).ok() && second.next(batch).ok());
  ASSERT_TRUE(whole.next(expected).ok());
  EXPECT_TRUE(same(expected, batch));
}

TEST_F(Batches, DocumentsLongerThanARowAreRefused) {
  const auto made = BatchReader::create(split(), {2, 28, Packing::kDocuments});
  ASSERT_FALSE(made.ok());
  EXPECT_NE(made.status().message().find("29 tokens"), std::string::npos)
      << made.status().message();
}

// A dataset with targets: after token t comes 2 t, at weight t / 100, but at ends of documents
// nothing; a memory stores it t + 0.5 times.
class WeighedBatches : public testing::Test {
 protected:
  WeighedBatches() {
    fs::create_directories(folder_);
    SplitWriter writer(folder_, "train", 50);
    for (int document = 0; document < 12; ++document) {
      std::vector<std::int32_t> ids, targets;
      std::vector<float> weights, writes;
      for (int i = 0; i < 5 + document; ++i) ids.push_back(20 * document + i);
      ids.push_back(kEod);
      for (const auto id : ids) {
        targets.push_back(id == kEod ? kNoTarget : 2 * id);
        weights.push_back(static_cast<float>(id == kEod ? 0 : id) / 100);
        writes.push_back(static_cast<float>(id) + 0.5f);
      }
      EXPECT_TRUE(writer.add(ids, 1, targets, weights, writes).ok());
    }
    EXPECT_TRUE(
        write_dataset_info(folder_, {"test", 4096, kEod, 0, {{"train", *writer.finish()}}}).ok());
  }
  ~WeighedBatches() override { fs::remove_all(folder_); }
  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-weighed-", ::getpid());
};

TEST_F(WeighedBatches, TargetsAndWeightsComeFromTheData) {
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok()) << dataset.status().message();
  const auto split = *dataset->split("train");
  const auto expect_weighed = [](const Batch& batch) {
    ASSERT_EQ(batch.weights.size(), batch.targets.size());
    ASSERT_EQ(batch.writes.size(), batch.targets.size());
    double sum = 0;
    for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
      const bool end = batch.inputs[i] == kEod;
      EXPECT_EQ(batch.targets[i], end ? kNoTarget : 2 * batch.inputs[i]);
      EXPECT_EQ(batch.weights[i], end ? 0 : static_cast<float>(batch.inputs[i]) / 100);
      const float written = static_cast<float>(batch.inputs[i]) + 0.5f;
      EXPECT_TRUE(batch.writes[i] == written || (end && batch.writes[i] == 1));  // 1: padding
      sum += static_cast<double>(batch.weights[i]);
    }
    EXPECT_NEAR(batch.weight(), sum, 1e-9);
  };
  for (const Packing packing : {Packing::kPacked, Packing::kShuffled, Packing::kDocuments}) {
    auto reader = *BatchReader::create(split, {.rows = 3, .row_tokens = 37, .packing = packing});
    Batch batch;
    for (int i = 0; i < 20; ++i) {
      ASSERT_TRUE(reader.next(batch).ok());
      expect_weighed(batch);
    }
  }
  SequentialReader line(split, 23);
  Batch batch;
  while (*line.next(batch)) expect_weighed(batch);
}

TEST_F(WeighedBatches, TargetsThatDoNotFitAreRefused) {
  const auto open_with = [&](std::vector<std::int32_t> targets, std::vector<float> weights,
                             bool with_writes = true) {
    const std::vector<float> writes(with_writes ? targets.size() : 0, 2);
    EXPECT_TRUE(
        write_targets(folder_ / "train-00000.targets.safetensors", targets, weights, writes).ok());
    EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(folder_));
    return dataset.verify();
  };
  const auto tokens = (*TokenDataset::open(folder_)).info().splits.at("train").shards[0].tokens;
  std::vector<std::int32_t> targets(static_cast<std::size_t>(tokens), 7);
  std::vector<float> weights(targets.size(), 1);
  EXPECT_TRUE(open_with(targets, weights).ok());
  EXPECT_FALSE(open_with(targets, weights, false).ok());  // the other shards have writes
  targets[3] = 4096;
  EXPECT_FALSE(open_with(targets, weights).ok());
  targets[3] = 7;
  targets.pop_back();
  weights.pop_back();
  EXPECT_FALSE(open_with(targets, weights).ok());
  const std::vector<float> negative = {-1}, nan = {std::nanf("")};
  const std::vector<std::int32_t> one = {1};
  const std::vector<float> right = {1}, two = {1, 1};
  for (const auto& wrong : {negative, nan}) {
    EXPECT_FALSE(write_targets(folder_ / "x", one, wrong).ok());
    EXPECT_FALSE(write_targets(folder_ / "x", one, right, wrong).ok());
  }
  EXPECT_FALSE(write_targets(folder_ / "x", one, right, two).ok());
  EXPECT_TRUE(write_targets(folder_ / "x", one, right, right).ok());
  EXPECT_FALSE(
      write_targets(folder_ / "x", std::vector<std::int32_t>{-2}, std::vector<float>{1}).ok());
  EXPECT_FALSE(
      write_targets(folder_ / "x", std::vector<std::int32_t>{1, 2}, std::vector<float>{1}).ok());
}

TEST_F(WeighedBatches, ASplitHasTargetsForAllDocumentsOrForNone) {
  const std::vector<std::int32_t> ids = {1, kEod}, targets = {5, kNoTarget};
  const std::vector<float> weights = {1, 0};
  for (const bool first : {false, true}) {
    SplitWriter writer(folder_, "other", 100);
    ASSERT_TRUE((first ? writer.add(ids, 1, targets, weights) : writer.add(ids, 1)).ok());
    ASSERT_TRUE((first ? writer.add(ids, 1) : writer.add(ids, 1, targets, weights)).ok());
    EXPECT_FALSE(writer.finish().ok());
  }
  SplitWriter writer(folder_, "other", 100);
  EXPECT_FALSE(writer.add(ids, 1, targets, std::vector<float>{1}).ok());
  EXPECT_FALSE(writer.add(ids, 1, targets, weights, std::vector<float>{1}).ok());
  SplitWriter some(folder_, "other", 100);
  ASSERT_TRUE(some.add(ids, 1, targets, weights, weights).ok());
  ASSERT_TRUE(some.add(ids, 1, targets, weights).ok());
  EXPECT_FALSE(some.finish().ok());
}

}  // namespace
}  // namespace everlong
