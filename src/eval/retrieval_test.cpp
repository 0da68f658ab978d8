#include "eval/retrieval.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "eval/retrieval_page.h"

namespace everlong {
namespace {

using Ids = std::vector<std::int32_t>;

// Remembers the last `memory` tokens and says what followed the same four tokens before: finds a
// passkey by copying.
class Copier : public TextReader {
 public:
  explicit Copier(std::int64_t memory) : memory_(memory) {}
  void reset() override {
    read_.clear();
    ++resets;
  }
  Status feed(std::span<const std::int32_t> tokens) override {
    longest_piece = std::max<std::int64_t>(longest_piece, std::ssize(tokens));
    read_.insert(read_.end(), tokens.begin(), tokens.end());
    fed += std::ssize(tokens);
    return {};
  }
  Result<std::int32_t> predict() override {
    const auto size = std::ssize(read_);
    lengths[size] += 1;
    const auto from = std::max<std::int64_t>(size - memory_, 0);
    for (auto at = size - 1; at >= from + 4; --at)
      if (std::equal(read_.end() - 4, read_.end(), read_.begin() + at - 4))
        return read_[static_cast<std::size_t>(at)];
    return 3;
  }
  std::int64_t state_bytes() const override { return 4 * memory_; }

  std::int64_t longest_piece = 0, resets = 0, fed = 0;
  std::map<std::int64_t, std::int64_t> lengths;  // tokens read at a prediction: how often

 private:
  std::int64_t memory_;
  Ids read_;
};

struct Made {
  std::unique_ptr<Tokenizer> tokenizer = *make_tokenizer("words");
  Filler filler = *Filler::make(FillerKind::kSentences, *tokenizer);
  RetrievalPrompts prompts = *RetrievalPrompts::make({}, *tokenizer, filler);
};

TEST(Retrieval, WhoRemembersAllFindsAll) {
  const Made made;
  Copier reader(1 << 20);
  const RetrievalOptions options{.lengths = {64, 200, 3000}, .prompts = 7, .jitter = 5, .feed = 90};
  const auto report = *retrieval(reader, made.prompts, options);
  ASSERT_EQ(report.cells.size(), 9u);
  for (const auto& cell : report.cells) {
    EXPECT_EQ(cell.score.exact.successes, 7);
    EXPECT_EQ(cell.score.exact.trials, 7);
    EXPECT_EQ(cell.score.tokens.successes, 35);
    EXPECT_EQ(cell.control.exact.trials, 7);
    EXPECT_EQ(cell.control.tokens.successes, 0);  // the question alone does not hold the number
  }
  EXPECT_EQ(report.total().exact.successes, 63);
  EXPECT_LE(reader.longest_piece, 90);  // no prompt in memory
  EXPECT_EQ(reader.resets, 2 * 63);
}

TEST(Retrieval, WhoRemembersNothingFindsNothing) {
  const Made made;
  Copier reader(5);
  const auto report = *retrieval(reader, made.prompts, {.lengths = {100, 1000}, .prompts = 4});
  EXPECT_EQ(report.total().exact.successes, 0);
  EXPECT_EQ(report.total().tokens.successes, 0);
  EXPECT_EQ(report.total().tokens.trials, 2 * 3 * 4 * 5);
}

TEST(Retrieval, AWindowFindsWhatLiesInItAndNothingElse) {
  const Made made;
  Copier reader(80);
  const auto report = *retrieval(
      reader, made.prompts,
      {.lengths = {1000}, .depths = {0, 0.5, 1}, .prompts = 5, .jitter = 10, .local = 80});
  for (const auto& cell : report.cells) {
    const bool end = cell.depth == 1;
    EXPECT_EQ(cell.score.exact.successes, end ? 5 : 0) << cell.depth;
    EXPECT_EQ(cell.control.exact.successes, end ? 5 : 0) << cell.depth;
    EXPECT_EQ(cell.within_local, end ? 5 : 0) << cell.depth;
    for (const auto& prompt : cell.prompts) {
      EXPECT_LE(cell.nearest, 1000 - prompt.fact_begin - 23);
      EXPECT_GE(cell.farthest, 1000 - prompt.fact_begin - 23);
    }
  }
  EXPECT_LE(report.cells[2].farthest, 20);  // the question and the jitter
}

TEST(Retrieval, EveryAnswerIsAskedForAfterExactlyThePrompt) {
  const Made made;
  for (const std::int64_t feed : {1, 7, 100, 4096}) {
    Copier reader(1 << 20);
    const auto report = *retrieval(
        reader, made.prompts,
        {.lengths = {100, 777}, .depths = {0.4}, .prompts = 3, .feed = feed, .control = false});
    for (const std::int64_t length : {100, 777})
      for (std::int64_t digit = 0; digit < 5; ++digit)
        EXPECT_EQ(reader.lengths[length + digit], 3) << length << " + " << digit;
    EXPECT_EQ(reader.lengths.size(), 10u);
    EXPECT_EQ(report.tokens, 3 * 877);
    EXPECT_EQ(report.tokens, tokens_to_read(report.options));
  }
}

TEST(Retrieval, PromptsMayBeShorterEachItsOwnWay) {
  const Made made;
  Copier reader(1 << 20);
  RetrievalOptions options{
      .lengths = {300}, .depths = {0, 1}, .prompts = 40, .length_jitter = 20, .control = false};
  const auto report = *retrieval(reader, made.prompts, options);
  EXPECT_EQ(report.total().exact.successes, 80) << "the question ends where the prompt does";
  std::set<std::int64_t> seen;
  for (const auto& [length, count] : reader.lengths)
    if (length <= 300) seen.insert(length);
  EXPECT_GE(*seen.begin(), 280);
  EXPECT_GT(seen.size(), 15u) << "of 21 lengths";
  EXPECT_EQ(report.cells[1].nearest, report.cells[1].farthest) << "the question alone comes after";
  const auto object = to_json(report);
  EXPECT_EQ(object["length_jitter"], 20);
  EXPECT_EQ(object["by_length"][0]["exact"]["trials"], 80);
  options.lengths = {60};
  EXPECT_FALSE(retrieval(reader, made.prompts, options).ok()) << "40 are too few";
}

TEST(Retrieval, CellsDoNotDependOnOneAnother) {
  const Made made;
  Copier first(300), second(300);
  const auto all =
      *retrieval(first, made.prompts,
                 {.lengths = {400, 200}, .depths = {0.5, 0.2}, .prompts = 3, .jitter = 50});
  const auto one = *retrieval(second, made.prompts,
                              {.lengths = {200}, .depths = {0.2}, .prompts = 3, .jitter = 50});
  for (std::size_t i = 0; i < 3; ++i)
    EXPECT_EQ(all.cells[3].prompts[i].fact_begin, one.cells[0].prompts[i].fact_begin);
  EXPECT_EQ(all.cells[3].score.tokens.successes, one.cells[0].score.tokens.successes);
}

TEST(Retrieval, SeparatorsAreFedAndNotCounted) {
  const Made made;
  const auto prompts = *RetrievalPrompts::make({.kind = RetrievalKind::kMultiValue, .needles = 3},
                                               *made.tokenizer, made.filler);
  Copier reader(1 << 20);
  const auto report = *retrieval(reader, prompts,
                                 {.lengths = {500}, .depths = {0}, .prompts = 2, .control = false});
  EXPECT_EQ(report.cells[0].score.tokens.trials, 2 * 15);
  EXPECT_EQ(reader.lengths.rbegin()->first, 500 + 16);
}

TEST(Retrieval, OneWrongTokenIsNotExact) {
  const Made made;
  struct FirstWrong : Copier {
    FirstWrong() : Copier(1 << 20) {}
    void reset() override {
      Copier::reset();
      asked = 0;
    }
    Result<std::int32_t> predict() override { return asked++ == 0 ? 3 : Copier::predict(); }
    int asked = 0;
  } reader;
  const auto report = *retrieval(reader, made.prompts, {.lengths = {100}, .prompts = 4});
  EXPECT_EQ(report.total().exact.successes, 0);
  EXPECT_EQ(report.total().tokens.successes, 3 * 4 * 4);
}

TEST(Retrieval, StopsWhenTheProgressFails) {
  const Made made;
  Copier reader(100);
  int calls = 0;
  const auto report =
      retrieval(reader, made.prompts, {.lengths = {10'000}, .feed = 100},
                [&](std::int64_t tokens, const RetrievalScore&) -> Status {
                  EXPECT_EQ(tokens, 100 * ++calls);
                  return calls < 3 ? Status() : Status(StatusCode::kInterrupted, "enough");
                });
  EXPECT_EQ(report.status().code(), StatusCode::kInterrupted);
  EXPECT_EQ(reader.fed, 300);
}

TEST(Retrieval, WhatCannotBeMeasuredIsRefusedBeforeAnythingIsRead) {
  const Made made;
  Copier reader(100);
  const std::vector<RetrievalOptions> wrong = {
      {.lengths = {}},       {.depths = {}}, {.prompts = 0}, {.lengths = {1000, 45}},
      {.depths = {0, 1.01}}, {.jitter = -1}, {.feed = 0},    {.local = -1},
      {.length_jitter = -1}};
  for (const auto& options : wrong) EXPECT_FALSE(retrieval(reader, made.prompts, options).ok());
  EXPECT_EQ(reader.fed, 0);
}

TEST(Retrieval, ObjectAndPageSayWhatWasFound) {
  const Made made;
  Copier reader(80);
  const auto report =
      *retrieval(reader, made.prompts, {.lengths = {100, 2048}, .prompts = 5, .local = 16});
  const auto object = to_json(report);
  EXPECT_EQ(object.at("task").at("kind"), "passkey");
  EXPECT_EQ(object.at("cells").size(), 6u);
  EXPECT_EQ(object.at("cells")[5].at("length"), 2048);
  EXPECT_EQ(object.at("cells")[5].at("exact").at("successes"), 5);
  EXPECT_EQ(object.at("cells")[3].at("exact").at("high"), Proportion({0, 5}).high());
  EXPECT_EQ(object.at("cells")[3].at("prompts").size(), 5u);
  EXPECT_EQ(object.at("total").at("exact").at("trials"), 30);

  auto said = object;
  said["model"] = "runs/<odd>";
  const std::string page = retrieval_page(report, said);
  EXPECT_NE(page.find("runs/&lt;odd&gt;"), std::string::npos);
  EXPECT_NE(page.find("2,048"), std::string::npos);
  EXPECT_EQ(page.find("nan"), std::string::npos);
  EXPECT_EQ(page.find("<script"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos);
  const std::string map = retrieval_map(object, false);
  EXPECT_NE(map.find(">2K<"), std::string::npos);
  // Six cells, of which those that a window of 80 reaches are full and the others empty.
  std::size_t full = 0, empty = 0;
  for (auto at = map.find("fill-opacity"); at != std::string::npos;
       at = map.find("fill-opacity", at + 1))
    ++(map.substr(at, 20).find("0.750") != std::string::npos ? full : empty);
  EXPECT_EQ(full + empty, 6u);
  EXPECT_EQ(full, 3u) << map;
  const auto last_row = map.substr(map.find(">100 %<"));
  EXPECT_NE(last_row.find("exact 100 % (5/5"), std::string::npos);
  EXPECT_EQ(last_row.find("exact 0 %"), std::string::npos);
}

TEST(Retrieval, MapOfAnObjectFromElsewhereShowsWhatItHas) {
  for (const char* text :
       {"{}", R"({"lengths": 3, "depths": "x", "cells": {}})",
        R"({"lengths": [1024], "depths": [0.5], "cells": [1, {}, {"length": 1024, "depth": 0.5},
            {"length": 1024, "depth": 0.5, "exact": {"successes": 5, "trials": 3}},
            {"length": 7, "depth": 0.5, "exact": {"successes": 1, "trials": 3}}]})"}) {
    const auto object = nlohmann::ordered_json::parse(text);
    for (const bool control : {false, true})
      EXPECT_EQ(retrieval_map(object, control).find("fill-opacity"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace everlong
