#include "data/retrieval_task.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace everlong {
namespace {

constexpr RetrievalKind kAll[] = {RetrievalKind::kPasskey, RetrievalKind::kSingle,
                                  RetrievalKind::kMultiKey, RetrievalKind::kMultiValue,
                                  RetrievalKind::kTracking};

struct Maker {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Filler> filler;
  RetrievalPrompts prompts;
};

Maker maker(const RetrievalTask& task, const char* tokenizer = "words",
            FillerKind kind = FillerKind::kSentences) {
  auto ids = *make_tokenizer(tokenizer);
  auto filler = std::make_unique<Filler>(*Filler::make(kind, *ids));
  auto prompts = RetrievalPrompts::make(task, *ids, *filler);
  EXPECT_TRUE(prompts.ok()) << prompts.status().message();
  return {std::move(ids), std::move(filler), *std::move(prompts)};
}

std::vector<std::int32_t> read(const Maker& made, const RetrievalPrompt& prompt,
                               std::int64_t piece) {
  PromptReader reader(prompt, *made.filler);
  std::vector<std::int32_t> ids, buffer(static_cast<std::size_t>(piece));
  for (;;) {
    const auto count = *reader.next(buffer);
    ids.insert(ids.end(), buffer.begin(), buffer.begin() + count);
    if (count < piece) return ids;
  }
}

std::int64_t count(const std::string& text, const std::string& part) {
  std::int64_t found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(RetrievalTask, PromptHasExactlyTheAskedLengthHoweverItIsCut) {
  for (const char* tokenizer : {"words", "bytes"})
    for (const RetrievalKind kind : kAll) {
      const auto made = maker({.kind = kind}, tokenizer);
      for (const std::int64_t more : {0, 1, 2, 50, 1000})
        for (const double depth : {0.0, 0.3, 1.0}) {
          const std::int64_t tokens = made.prompts.least_tokens() + more;
          const auto prompt = made.prompts.prompt({tokens, depth, 5}, 9);
          ASSERT_TRUE(prompt.ok()) << name(kind) << ": " << prompt.status().message();
          const auto whole = read(made, *prompt, tokens + 1);
          EXPECT_EQ(std::ssize(whole), tokens) << name(kind);
          EXPECT_EQ(prompt->tokens, tokens);
          EXPECT_EQ(whole, read(made, *prompt, 7)) << name(kind);
        }
    }
}

TEST(RetrievalTask, FactLiesAtItsDepth) {
  const auto made = maker({});
  constexpr std::int64_t kIntro = 13, kFact = 23, kQuestion = 10, kTokens = 1000;
  constexpr std::int64_t kRoom = kTokens - kIntro - kFact - kQuestion;
  for (const double depth : {0.0, 0.25, 0.5, 1.0}) {
    const auto prompt = *made.prompts.prompt({kTokens, depth, 0}, 4);
    EXPECT_EQ(prompt.fact_begin, kIntro + std::llround(depth * kRoom));
    EXPECT_EQ(prompt.fact_end - prompt.fact_begin, kFact);
    const auto ids = read(made, prompt, 64);
    const std::string fact = made.tokenizer->decode(
        std::span(ids).subspan(static_cast<std::size_t>(prompt.fact_begin), kFact));
    EXPECT_TRUE(fact.starts_with("the pass key is ")) << fact;
    EXPECT_TRUE(fact.ends_with("is the pass key .")) << fact;
    const std::string answer = made.tokenizer->decode(prompt.answer);
    EXPECT_EQ(count(fact, answer), 2) << fact;
    EXPECT_TRUE(made.tokenizer->decode(ids).ends_with("what is the pass key ? the pass key is"));
  }
}

TEST(RetrievalTask, JitterMovesTheFactEitherWayAndNeverOutOfTheFiller) {
  const auto made = maker({});
  for (const double depth : {0.0, 0.5, 1.0}) {
    const auto still = *made.prompts.prompt({500, depth, 0}, 0);
    std::set<std::int64_t> moved;
    for (std::uint64_t seed = 0; seed < 300; ++seed) {
      const auto prompt = *made.prompts.prompt({500, depth, 8}, seed);
      EXPECT_LE(std::abs(prompt.fact_begin - still.fact_begin), 8);
      EXPECT_GE(prompt.fact_begin, 13);
      EXPECT_LE(prompt.fact_end, 490);
      moved.insert(prompt.fact_begin);
    }
    EXPECT_EQ(moved.size(), depth == 0.5 ? 17u : 9u);
  }
}

TEST(RetrievalTask, SeedDecidesEverything) {
  for (const RetrievalKind kind : kAll) {
    const auto made = maker({.kind = kind}, "words", FillerKind::kWords);
    const auto other = maker({.kind = kind}, "words", FillerKind::kWords);
    std::set<std::vector<std::int32_t>> answers, texts;
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const auto prompt = *made.prompts.prompt({300, 0.5, 3}, seed);
      const auto again = *other.prompts.prompt({300, 0.5, 3}, seed);
      EXPECT_EQ(prompt.answer, again.answer);
      EXPECT_EQ(read(made, prompt, 300), read(other, again, 11));
      answers.insert(prompt.answer);
      texts.insert(read(made, prompt, 300));
    }
    EXPECT_EQ(answers.size(), 20u) << name(kind);
    EXPECT_EQ(texts.size(), 20u) << name(kind);
  }
}

// Short numbers in a filler full of digits: without the check two of three prompts leak here.
TEST(RetrievalTask, NumberOccursNowhereButInItsFacts) {
  for (const char* tokenizer : {"words", "bytes"})
    for (const RetrievalKind kind :
         {RetrievalKind::kPasskey, RetrievalKind::kMultiKey, RetrievalKind::kMultiValue}) {
      const auto made =
          maker({.kind = kind, .digits = 3, .needles = 2}, tokenizer, FillerKind::kDigits);
      std::int64_t digits = 0;
      for (std::uint64_t seed = 0; seed < 40; ++seed) {
        const auto prompt = *made.prompts.prompt({60'000, 0.5, 0}, seed);
        std::string text = made.tokenizer->decode(read(made, prompt, 4096));
        std::string number = made.tokenizer->decode(std::span(prompt.answer).first(3));
        EXPECT_EQ(count(text, number), kind == RetrievalKind::kPasskey ? 2 : 1)
            << tokenizer << " " << name(kind) << " " << number;
        digits += std::ranges::count(text, '7');
      }
      EXPECT_GT(digits, 10'000);
    }
}

TEST(RetrievalTask, OccurrencesAreCountedAcrossTheBordersOfWhatIsRead) {
  const auto filler = *Filler::from_text({1, [](std::int64_t, std::span<std::int32_t> out) {
                                            std::ranges::fill(out, 7);
                                            return Status();
                                          }});
  const RetrievalPrompt prompt{.pieces = {{100'000, {7, 1}}}, .tokens = 100'002};
  EXPECT_EQ(*occurrences(prompt, filler, std::vector<std::int32_t>{7}), 100'001);
  EXPECT_EQ(*occurrences(prompt, filler, std::vector<std::int32_t>{7, 7, 7}), 99'999);
  EXPECT_EQ(*occurrences(prompt, filler, std::vector<std::int32_t>{7, 1}), 1);
}

TEST(RetrievalTask, WordsOfEveryTaskAndFillerAreInTheList) {
  for (const RetrievalKind kind : kAll)
    for (const FillerKind filler :
         {FillerKind::kSentences, FillerKind::kShuffled, FillerKind::kWords, FillerKind::kDigits})
      for (std::uint64_t seed = 0; seed < 30; ++seed) {
        const auto made =
            maker({.kind = kind, .needles = 8, .hops = 7, .chains = 2}, "words", filler);
        const auto prompt = *made.prompts.prompt({400, 0.5, 0}, seed);
        auto ids = read(made, prompt, 400);
        ids.insert(ids.end(), prompt.answer.begin(), prompt.answer.end());
        EXPECT_EQ(std::ranges::count(ids, 3), 0) << made.tokenizer->decode(ids);
        EXPECT_EQ(made.tokenizer->encode(made.tokenizer->decode(ids)), ids);
      }
}

TEST(RetrievalTask, FillerThatHoldsEveryNumberIsRefused) {
  const auto made = maker({.digits = 1}, "words", FillerKind::kDigits);
  const auto prompt = made.prompts.prompt({10'000, 0.5, 0}, 1);
  ASSERT_FALSE(prompt.ok());
  EXPECT_NE(prompt.status().message().find("ask for more digits"), std::string::npos);
}

TEST(RetrievalTask, MultiKeyAsksForOneOfSeveralLabels) {
  const auto made = maker({.kind = RetrievalKind::kMultiKey, .needles = 4}, "bytes");
  std::set<std::string> asked;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    const auto prompt = *made.prompts.prompt({2000, 0.25, 0}, seed);
    const std::string text = made.tokenizer->decode(read(made, prompt, 333));
    EXPECT_EQ(count(text, " is ") >= 4, true);
    const auto at = text.rfind("The magic number of ");
    const std::string label = text.substr(at + 20, text.find(' ', at + 20) - at - 20);
    EXPECT_EQ(count(text, cat("The magic number of ", label, " is ",
                              made.tokenizer->decode(prompt.answer), ".")),
              1)
        << text;
    EXPECT_EQ(count(text, "The magic number of "), 5);
    asked.insert(label);
  }
  EXPECT_GT(asked.size(), 8u);
}

TEST(RetrievalTask, MultiValueAsksForAllNumbersInTheirOrder) {
  const auto made = maker({.kind = RetrievalKind::kMultiValue, .needles = 3}, "bytes");
  const auto prompt = *made.prompts.prompt({1500, 0, 0}, 3);
  const std::string text = made.tokenizer->decode(read(made, prompt, 100));
  const std::string answer = made.tokenizer->decode(prompt.answer);
  ASSERT_EQ(answer.size(), 3 * 5 + 2 * 2u);
  std::size_t before = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto at = text.find(answer.substr(7 * i, 5));
    ASSERT_NE(at, std::string::npos);
    EXPECT_GT(at, before);
    before = at;
  }
  for (std::size_t i = 0; i < answer.size(); ++i)
    EXPECT_EQ(prompt.scored[i] != 0, answer[i] >= '0' && answer[i] <= '9') << i;
}

// Follows the assignments through the text and compares with the answer.
TEST(RetrievalTask, TrackedVariablesAreThoseThatHoldTheNumber) {
  const auto made = maker({.kind = RetrievalKind::kTracking, .hops = 3, .chains = 3}, "bytes");
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto prompt = *made.prompts.prompt({3000, 0.2, 0}, seed);
    const std::string text = made.tokenizer->decode(read(made, prompt, 256));
    std::map<char, std::string> values;
    std::string order;
    for (auto at = text.find("VAR "); at != std::string::npos;) {
      const char variable = text[at + 4];
      const auto value = at + 8, end = text.find('.', value);
      std::string given = text.substr(value, end - value);
      if (given.starts_with("VAR ")) {
        ASSERT_TRUE(values.contains(given[4])) << "assigned before it has a value";
        given = values[given[4]];
      }
      values[variable] = given;
      order += variable;
      at = text.find("VAR ", end);
    }
    EXPECT_EQ(order.size(), 12u);
    const auto question = text.rfind("hold ");
    const std::string number = text.substr(question + 5, 5);
    std::string expected;
    for (const char variable : order)
      if (values[variable] == number) expected += cat(expected.empty() ? "" : ", ", variable);
    EXPECT_EQ(made.tokenizer->decode(prompt.answer), expected);
    EXPECT_EQ(count(expected, ","), 3);
  }
}

TEST(RetrievalTask, ImpossibleSizesAreRefused) {
  EXPECT_TRUE(validate({}).ok());
  EXPECT_FALSE(validate({.digits = 0}).ok());
  EXPECT_FALSE(validate({.digits = 19}).ok());
  EXPECT_FALSE(validate({.needles = 0}).ok());
  EXPECT_FALSE(validate({.needles = 17}).ok());
  EXPECT_FALSE(validate({.kind = RetrievalKind::kMultiKey, .digits = 1, .needles = 6}).ok());
  EXPECT_FALSE(validate({.kind = RetrievalKind::kTracking, .hops = 8, .chains = 2}).ok());
  EXPECT_FALSE(validate({.hops = INT64_MAX, .chains = 2}).ok());
  const auto made = maker({});
  EXPECT_FALSE(made.prompts.prompt({made.prompts.least_tokens() - 1, 0, 0}, 1).ok());
  EXPECT_FALSE(made.prompts.prompt({500, 1.5, 0}, 1).ok());
  EXPECT_FALSE(made.prompts.prompt({500, 0, -1}, 1).ok());
}

}  // namespace
}  // namespace everlong
