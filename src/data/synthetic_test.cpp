#include "data/synthetic.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "data/batches.h"
#include "data/word_tokenizer.h"

namespace everlong {
namespace {

struct Maker {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Filler> filler;
  SyntheticDocuments documents;
};

Maker maker(const SyntheticSettings& settings, const char* tokenizer = "words") {
  auto ids = *make_tokenizer(tokenizer);
  auto filler = std::make_unique<Filler>(*Filler::make(settings.filler, *ids));
  auto documents = SyntheticDocuments::make(settings, *ids, *filler);
  EXPECT_TRUE(documents.ok()) << documents.status().message();
  return {std::move(ids), std::move(filler), *std::move(documents)};
}

class SyntheticFolder : public testing::Test {
 protected:
  ~SyntheticFolder() override { fs::remove_all(folder_); }
  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-synthetic-", ::getpid());
};

TEST(Synthetic, DocumentIsPromptAnswerAndEnd) {
  for (const char* tokenizer : {"words", "bytes"})
    for (const char* task : {"passkey", "single", "multikey", "multivalue", "tracking"}) {
      const auto made = maker({.task = task, .lengths = {{700, 900}}}, tokenizer);
      for (std::uint64_t number = 0; number < 20; ++number) {
        const auto document = *made.documents.document(number);
        EXPECT_GE(document.ids.size(), 700u);
        EXPECT_LE(document.ids.size(), 900u);
        ASSERT_EQ(document.targets.size(), document.ids.size());
        ASSERT_EQ(document.weights.size(), document.ids.size());
        EXPECT_EQ(document.ids.back(), made.tokenizer->eod());
        EXPECT_EQ(document.targets.back(), kNoTarget);
        double answer = 0, rest = 0;
        std::vector<std::int32_t> asked;
        for (std::size_t i = 0; i + 1 < document.ids.size(); ++i) {
          EXPECT_EQ(document.targets[i], document.ids[i + 1]);
          const bool counts = document.weights[i] > 0.002f;
          (counts ? answer : rest) += static_cast<double>(document.weights[i]);
          if (counts) asked.push_back(document.targets[i]);
        }
        EXPECT_NEAR(answer, 1, 1e-6) << task;
        EXPECT_NEAR(rest, 0.2, 1e-5) << task;
        // What counts stands at the end, but for separators and the end itself.
        const std::string text = made.tokenizer->decode(document.ids);
        const std::string last = made.tokenizer->decode(asked);
        EXPECT_EQ(last.back(), text.back()) << task << ": " << last;
      }
    }
}

TEST(Synthetic, LengthsFollowTheirSharesOfTheTokens) {
  const auto ranges = length_ranges("52-121:85,300-481:15");
  ASSERT_TRUE(ranges.ok());
  const auto made = maker({.lengths = *ranges});
  double tokens = 0, longer = 0;
  for (std::uint64_t number = 0; number < 4000; ++number) {
    const auto size = std::ssize((*made.documents.document(number)).ids);
    EXPECT_TRUE((size >= 52 && size <= 121) || (size >= 300 && size <= 481)) << size;
    tokens += static_cast<double>(size);
    if (size >= 300) longer += static_cast<double>(size);
  }
  // 4000 documents, about 155 of them long: the share scatters by 8 % of itself.
  EXPECT_NEAR(longer / tokens, 0.15, 0.04);
}

TEST(Synthetic, LengthRangesThatMakeNoSenseAreRefused) {
  EXPECT_EQ(length_ranges("1K")->at(0).high, 1024);
  for (const char* wrong : {"", "x", "0", "9-3", "5-", "-5", "5:0", "5:x", "5:-1", "5-6-7", "3,,4"})
    EXPECT_FALSE(length_ranges(wrong).ok()) << wrong;
}

TEST(Synthetic, RecallAsksForTheSymbolAfterIt) {
  const auto made = maker({.task = "recall",
                           .recall = {.symbols = 8, .first = 10, .last = 191, .questions = 0.125},
                           .lengths = {{256, 256}}});
  const std::int32_t blank = made.tokenizer->encode("_")[0],
                     question = made.tokenizer->encode("?")[0];
  std::set<std::int32_t> symbols;
  std::set<std::ptrdiff_t> places;
  std::int64_t questions = 0;
  for (std::uint64_t number = 0; number < 600; ++number) {
    const auto document = *made.documents.document(number);
    ASSERT_EQ(document.ids.size(), 256u);
    EXPECT_EQ(document.ids.back(), made.tokenizer->eod());
    const auto place = std::ranges::find_if(document.ids, [&](std::int32_t id) {
      return id != blank && id != question && id != made.tokenizer->eod();
    });
    const auto at = place - document.ids.begin();
    ASSERT_LT(at, 255);
    symbols.insert(*place);
    places.insert(at);
    for (std::ptrdiff_t i = 0; i < 256; ++i) {
      const auto t = static_cast<std::size_t>(i);
      const bool asks = document.ids[t] == question;
      questions += asks ? 1 : 0;
      EXPECT_EQ(document.targets[t], asks && i > at ? *place : kNoTarget);
      EXPECT_EQ(document.weights[t], asks && i > at ? 1 : 0);
      EXPECT_TRUE(asks || i == at || i == 255 || document.ids[t] == blank);
    }
  }
  EXPECT_EQ(symbols.size(), 8u);
  EXPECT_GE(*places.begin(), 10);
  EXPECT_LE(*places.rbegin(), 191);
  EXPECT_GT(places.size(), 150u);
  EXPECT_NEAR(static_cast<double>(questions), 600 * 254 / 8.0, 600);  // 4.5 standard deviations
}

// Against the law itself: the best predictor's loss in closed form, document by document, and the
// shares of the symbols over many.
TEST(Synthetic, CountsAreDirichletAndTheirBestLossIsExact) {
  constexpr double kA = 0.3, kK = 4;
  const auto made = maker(
      {.task = "counts", .counts = {.symbols = 4, .concentration = kA}, .lengths = {{40, 60}}});
  double squares = 0;
  for (std::uint64_t number = 0; number < 2000; ++number) {
    const auto document = *made.documents.document(number);
    std::map<std::int32_t, double> counts;
    const auto n = static_cast<double>(document.ids.size() - 1);
    for (std::size_t i = 0; i + 1 < document.ids.size(); ++i) {
      counts[document.ids[i]] += 1;
      const bool asked = i + 2 < document.ids.size();
      EXPECT_EQ(document.targets[i], asked ? document.ids[i + 1] : kNoTarget);
      EXPECT_EQ(document.weights[i], asked ? 1 : 0);
    }
    EXPECT_LE(counts.size(), 4u);
    // ln of the Dirichlet-multinomial probability of this order of symbols, but for the first one.
    double nats = std::lgamma(kK * kA + n) - std::lgamma(kK * kA) - std::log(kK);
    for (const auto& [symbol, count] : counts)
      nats -= std::lgamma(kA + count) - std::lgamma(kA), squares += count * count / (n * n);
    EXPECT_NEAR(document.best_nats, nats, 1e-9);
  }
  // The mean of sum p^2 is (a + 1) / (K a + 1); counts add (1 - that) / n.
  const double share = (kA + 1) / (kK * kA + 1);
  EXPECT_NEAR(squares / 2000, share + (1 - share) / 49, 0.02);
}

TEST(Synthetic, LandmarksStandAtTheirPlacesAndAreNotAskedFor) {
  for (const char* task : {"passkey", "recall"})
    for (std::int64_t length = 90; length < 140; ++length) {
      const auto made = maker({.task = task, .lengths = {{length, length}}, .landmark_block = 16});
      const auto landmark = static_cast<std::int32_t>(made.tokenizer->vocab_size());
      EXPECT_EQ(made.documents.vocab_size(), landmark + 1);
      const auto document = *made.documents.document(7);
      EXPECT_EQ(std::ssize(document.ids), length % 16 == 0 ? length - 1 : length);
      std::vector<std::int32_t> text, targets;
      for (std::size_t i = 0; i < document.ids.size(); ++i) {
        EXPECT_EQ(document.ids[i] == landmark, i % 16 == 15);
        EXPECT_NE(document.targets[i], landmark);
        if (i % 16 == 15) {
          EXPECT_EQ(document.targets[i], kNoTarget);
          EXPECT_EQ(document.weights[i], 0);
          continue;
        }
        text.push_back(document.ids[i]);
        targets.push_back(document.targets[i]);
      }
      if (std::string(task) == "recall") continue;
      for (std::size_t i = 0; i + 1 < text.size(); ++i) EXPECT_EQ(targets[i], text[i + 1]);
    }
}

TEST_F(SyntheticFolder, TheSameSettingsGiveTheSameFiles) {
  const auto made = maker({.task = "multikey", .lengths = {{150, 200}}, .seed = 5});
  const SyntheticAmount amount{.train_tokens = 20'000, .valid_documents = 7, .shard_tokens = 6000};
  std::map<std::string, std::string> first;
  for (const int round : {0, 1}) {
    const auto report = write_synthetic(made.documents, *made.tokenizer, amount, folder_);
    ASSERT_TRUE(report.ok()) << report.status().message();
    EXPECT_EQ(report->dataset.splits.at("valid").documents, 7);
    EXPECT_GE(report->dataset.splits.at("train").tokens, 20'000);
    EXPECT_EQ(report->dataset.splits.at("train").shards.size(), 4u);
    for (const auto& entry : fs::directory_iterator(folder_)) {
      const auto text = *read_file(entry.path());
      if (round == 0)
        first[entry.path().filename()] = text;
      else
        EXPECT_TRUE(first[entry.path().filename()] == text) << entry.path();
    }
    EXPECT_EQ(first.size(), 2 * 5 + 1u);
  }
  const auto other = maker({.task = "multikey", .lengths = {{150, 200}}, .seed = 6});
  ASSERT_TRUE(write_synthetic(other.documents, *other.tokenizer, amount, folder_).ok());
  EXPECT_NE(*read_file(folder_ / "train-00000.tokens"), first["train-00000.tokens"]);
}

// The filler alone is weighed, with one number a document, log-uniform; the text stays as it is.
TEST(Synthetic, WritesWeighTheFillerAndNothingElse) {
  const auto words = *make_tokenizer("words");
  const auto sentences = *Filler::make(FillerKind::kSentences, *words);
  for (const std::int64_t block : {0, 16}) {
    const auto plain = maker({.lengths = {{100, 160}}, .landmark_block = block});
    const auto made =
        maker({.lengths = {{100, 160}}, .write_multiplicity = 1000, .landmark_block = block});
    std::set<std::int32_t> of_filler;  // words that are in nothing but filler
    for (const char* word : {"grass", "green", "sky", "blue", "sun", "yellow", "go", "back"})
      of_filler.insert(words->encode(word).at(0));
    std::vector<double> drawn;
    for (std::uint64_t number = 0; number < 400; ++number) {
      const auto document = *made.documents.document(number);
      EXPECT_EQ(document.ids, plain.documents.document(number)->ids);
      EXPECT_TRUE(plain.documents.document(number)->writes.empty());
      ASSERT_EQ(document.writes.size(), document.ids.size());
      const float most = *std::ranges::max_element(document.writes);
      std::int64_t weighed = 0, landmarks = 0;
      for (std::size_t i = 0; i < document.ids.size(); ++i) {
        EXPECT_TRUE(document.writes[i] == most || document.writes[i] == 1);
        EXPECT_TRUE(!of_filler.contains(document.ids[i]) || document.writes[i] == most);
        EXPECT_TRUE(document.ids[i] != 86 || document.writes[i] == 1);
        weighed += document.writes[i] == most ? 1 : 0;
        landmarks += document.ids[i] == 86 ? 1 : 0;
      }
      // Intro, needle, question, answer and end are the least prompt and six tokens.
      EXPECT_EQ(weighed, std::ssize(document.ids) - landmarks -
                             RetrievalPrompts::make({}, *words, sentences)->least_tokens() - 6);
      drawn.push_back(std::log(static_cast<double>(most)) / std::log(1000.0));
    }
    double mean = 0;
    for (const double share : drawn) mean += share / 400;
    EXPECT_GE(*std::ranges::min_element(drawn), 0);
    EXPECT_LE(*std::ranges::max_element(drawn), 1);
    EXPECT_NEAR(mean, 0.5, 0.06);  // four deviations of a mean of 400 uniform numbers
  }
}

TEST_F(SyntheticFolder, WhatWasMadeIsWhatIsReadBack) {
  const auto made =
      maker({.lengths = {{80, 120}}, .write_multiplicity = 100, .landmark_block = 16});
  const auto report =
      write_synthetic(made.documents, *made.tokenizer,
                      {.train_tokens = 5000, .valid_documents = 3, .shard_tokens = 1000}, folder_);
  ASSERT_TRUE(report.ok()) << report.status().message();
  const auto dataset = TokenDataset::open(folder_);
  ASSERT_TRUE(dataset.ok()) << dataset.status().message();
  EXPECT_TRUE(dataset->verify().ok()) << dataset->verify().message();
  EXPECT_EQ(dataset->info().vocab_size, 87);
  const auto train = *dataset->split("train");
  ASSERT_TRUE(train.has_targets());
  for (std::int64_t i = 0; i < train.documents(); ++i) {
    const auto document = *made.documents.document(static_cast<std::uint64_t>(i));
    std::vector<std::int32_t> ids(document.ids.size()), targets(ids.size());
    std::vector<float> weights(ids.size());
    ASSERT_EQ(train.document_start(i + 1) - train.document_start(i), std::ssize(ids));
    ASSERT_TRUE(train.read(train.document_start(i), ids).ok());
    ASSERT_TRUE(train.read_targets(train.document_start(i), targets, weights).ok());
    EXPECT_EQ(ids, document.ids);
    EXPECT_EQ(targets, document.targets);
    EXPECT_EQ(weights, document.weights);
    ASSERT_TRUE(train.has_writes());
    ASSERT_TRUE(train.read_writes(train.document_start(i), weights).ok());
    EXPECT_EQ(weights, document.writes);
  }
  const auto valid = *dataset->split("valid");
  std::vector<std::int32_t> held_out(80), trained(80);
  ASSERT_TRUE(valid.read(0, held_out).ok() && train.read(0, trained).ok());
  EXPECT_NE(held_out, trained);
  // Across shards too, as rows read it.
  std::vector<std::int32_t> all(static_cast<std::size_t>(train.tokens())), ids(all.size());
  std::vector<float> weights(all.size());
  ASSERT_TRUE(train.read_targets(0, all, weights).ok());
  ASSERT_TRUE(train.read(0, ids).ok());
  EXPECT_EQ(std::ranges::count(all, kNoTarget), train.documents() + std::ranges::count(ids, 86));
}

TEST_F(SyntheticFolder, RefusesWhatCannotBeMade) {
  const auto words = *make_tokenizer("words");
  const auto bytes = *make_tokenizer("bytes");
  const auto filler = *Filler::make(FillerKind::kSentences, *words);
  const std::vector<SyntheticSettings> wrong = {
      {.task = "nonsense"},
      {.lengths = {}},
      {.text_weight = -1},
      {.text_weight = std::nan("")},
      {.landmark_block = 1},
      {.write_multiplicity = 0.5},
      {.write_multiplicity = 1e10},
      {.write_multiplicity = std::nan("")},
      {.task = "recall", .write_multiplicity = 10},
      {.task = "counts", .write_multiplicity = 10},
      {.task = "recall", .recall = {.symbols = 17}},
      {.task = "counts", .counts = {.symbols = 1}},
      {.task = "counts", .counts = {.concentration = 0}},
      {.task = "recall", .recall = {.first = 9, .last = 8}},
      {.task = "recall", .recall = {.questions = 0}}};
  for (const auto& settings : wrong)
    EXPECT_FALSE(SyntheticDocuments::make(settings, *words, filler).ok()) << settings.task;
  // Too short for the task: known when the first document is made; nothing stays behind.
  const auto made = maker({.lengths = {{40, 45}}});
  EXPECT_FALSE(write_synthetic(made.documents, *made.tokenizer, {}, folder_).ok());
  EXPECT_FALSE(fs::exists(folder_));
  const auto short_recall =
      maker({.task = "recall", .recall = {.first = 60}, .lengths = {{50, 50}}});
  EXPECT_FALSE(short_recall.documents.document(0).ok());
}

}  // namespace
}  // namespace everlong
