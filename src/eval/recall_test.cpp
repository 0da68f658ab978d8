#include "eval/recall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "data/word_tokenizer.h"

namespace everlong {
namespace {

// Knows the newest letter of the last `memory` tokens, as a window does.
class Window : public TextReader {
 public:
  explicit Window(std::int64_t memory) : memory_(memory) {
    const auto words = make_word_tokenizer();
    for (const auto letter : letter_words()) letters_.push_back(words->encode(letter)[0]);
  }
  void reset() override { read_.clear(); }
  Status feed(std::span<const std::int32_t> tokens) override {
    read_.insert(read_.end(), tokens.begin(), tokens.end());
    return {};
  }
  Result<std::int32_t> predict() override {
    const auto size = std::ssize(read_);
    for (auto at = size - 1; at >= std::max<std::int64_t>(size - memory_, 0); --at)
      if (std::ranges::find(letters_, read_[static_cast<std::size_t>(at)]) != letters_.end())
        return read_[static_cast<std::size_t>(at)];
    return 3;
  }
  std::int64_t state_bytes() const override { return 0; }

 private:
  std::int64_t memory_;
  std::vector<std::int32_t> letters_, read_;
};

TEST(Recall, WhoRemembersAllKnowsItEverywhere) {
  Window reader(1 << 20);
  const auto report = *recall(reader, *make_word_tokenizer(),
                              {.lengths = {64, 300}, .documents = 30, .chunk = 16, .modulus = 4});
  for (const auto& row : report.rows) {
    EXPECT_GT(row.right.trials, 30);
    EXPECT_EQ(row.right.successes, row.right.trials);
    Proportion by_distance, by_chunk, by_residue;
    for (const auto& group : row.distances) by_distance.add(group.right);
    for (const auto& group : row.chunks) by_chunk.add(group.right);
    for (const auto& group : row.residues) by_residue.add(group.right);
    for (const auto& sum : {by_distance, by_chunk, by_residue})
      EXPECT_EQ(sum.trials, row.right.trials);
    EXPECT_EQ(row.residues.size(), 4u);
    EXPECT_EQ(row.distances.front().begin, 1);
  }
}

TEST(Recall, AWindowKnowsItsOwnTokensOnly) {
  Window reader(32);  // reaches distances 1 to 31
  const auto report = *recall(reader, *make_word_tokenizer(), {.lengths = {400}, .documents = 60});
  bool far = false;
  for (const auto& group : report.rows[0].distances) {
    EXPECT_EQ(group.right.successes, group.end <= 32 ? group.right.trials : 0) << group.begin;
    EXPECT_EQ(group.end, 2 * group.begin);
    far = far || group.begin >= 32;
  }
  EXPECT_TRUE(far);
}

TEST(Recall, ChunksAreCountedBetweenSymbolAndQuestion) {
  Window reader(1 << 20);
  // One place for the symbol, in chunk 2 of 10 tokens; 100 tokens: up to 7 chunks back.
  const auto report = *recall(reader, *make_word_tokenizer(),
                              {.lengths = {100},
                               .task = {.first = 29, .last = 29, .questions = 1},
                               .documents = 2,
                               .chunk = 10});
  const auto& row = report.rows[0];
  EXPECT_EQ(row.right.trials, 2 * (99 - 30));
  ASSERT_EQ(row.chunks.size(), 7u);  // it is its chunk's last token: none in chunk 0
  for (std::size_t i = 0; i < 7; ++i) {
    EXPECT_EQ(row.chunks[i].begin, static_cast<std::int64_t>(i) + 1);
    EXPECT_EQ(row.chunks[i].right.trials, i < 6 ? 20 : 18);
  }
}

// A window of 32 asked with the reach of a window of 32: right is what was connected, nothing else.
TEST(Recall, PredictsWhatTheReachConnects) {
  Window reader(32);
  RecallOptions options{.lengths = {200}, .documents = 20};
  options.layers_from = [](std::int64_t place, std::int64_t tokens) {
    std::vector<std::int64_t> layers(static_cast<std::size_t>(tokens), -1);
    for (std::int64_t at = place; at < std::min(tokens, place + 32); ++at)
      layers[static_cast<std::size_t>(at)] = at == place ? 0 : 1;
    return layers;
  };
  const auto report = *recall(reader, *make_word_tokenizer(), options);
  const auto& row = report.rows[0];
  EXPECT_EQ(row.connected, row.right.successes);
  for (const auto& group : row.distances) EXPECT_EQ(group.connected, group.right.successes);
  ASSERT_EQ(row.layers.size(), 2u);
  EXPECT_EQ(row.layers[0].begin, -1);
  EXPECT_EQ(row.layers[0].right.successes, 0);
  EXPECT_EQ(row.layers[1].right.successes, row.layers[1].right.trials);
  EXPECT_EQ(predicted_share(0, 10, 8), 0.125);
  EXPECT_EQ(predicted_share(5, 10, 2), 0.75);
  const auto json = to_json(report);
  EXPECT_EQ(json["rows"][0]["connected"], row.connected);
  EXPECT_EQ(json["rows"][0]["layers"].size(), 2u);
}

TEST(Recall, StopsAndRefuses) {
  Window reader(5);
  const auto words = make_word_tokenizer();
  EXPECT_FALSE(recall(reader, *words, {.lengths = {}}).ok());
  EXPECT_FALSE(recall(reader, *words, {.documents = 0}).ok());
  EXPECT_FALSE(recall(reader, *words, {.chunk = -1}).ok());
  EXPECT_FALSE(recall(reader, *words, {.task = {.symbols = 99}}).ok());
  const auto stopped = recall(reader, *words, {.lengths = {64}}, [](std::int64_t documents) {
    return documents < 3 ? Status() : Status(StatusCode::kInterrupted, "enough");
  });
  EXPECT_EQ(stopped.status().code(), StatusCode::kInterrupted);
}

}  // namespace
}  // namespace everlong
