#include "eval/byte_baselines.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

namespace everlong {
namespace {

ByteModel learn(int order, const std::vector<std::string>& documents) {
  ByteModelTrainer trainer(order);
  for (const auto& document : documents) trainer.add(document);
  return std::move(trainer).finish();
}

// Words of a small alphabet: contexts repeat, and many stay unseen.
std::vector<std::string> some_documents(int count, int length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::string> documents(count);
  for (auto& document : documents)
    while (static_cast<int>(document.size()) < length)
      document += std::vector<std::string>{"ab", "ba ", "cad", "\xff", "dab "}[random() % 5];
  return documents;
}

TEST(ByteModel, ProbabilitiesArePositiveAndSumToOne) {
  for (int order = 0; order <= ByteModel::kMostOrder; ++order) {
    for (const auto& documents : {some_documents(5, 200, 1), std::vector<std::string>{"a"}, {""}}) {
      const ByteModel model = learn(order, documents);
      EXPECT_EQ(model.order(), order);
      for (const std::string context :
           {"", "a", "ab", "cad ba", "never seen", "ab\xff", "zzzzzz", "abz", "zab"}) {
        double sum = 0, least = 1;
        for (int symbol = 0; symbol < ByteModel::kSymbols; ++symbol) {
          const double p = model.probability(context, symbol);
          sum += p;
          least = std::min(least, p);
        }
        EXPECT_NEAR(sum, 1, 1e-12) << "order " << order << " after \"" << context << "\"";
        EXPECT_GT(least, 0);
      }
    }
  }
}

// The definition, from sets of symbol strings: no packing, no hashing, no shared code.
double by_definition(const std::vector<std::string>& documents, int order,
                     const std::vector<int>& context, int symbol) {
  using Gram = std::vector<int>;
  std::vector<std::map<Gram, double>> counts(order + 1);
  std::vector<std::set<Gram>> extended(order + 1);
  for (const auto& document : documents) {
    Gram line(order, 256);
    for (const char byte : document) line.push_back(static_cast<unsigned char>(byte));
    line.push_back(256);
    for (std::size_t at = order; at < line.size(); ++at) {
      ++counts[order][Gram(line.begin() + at - order, line.begin() + at + 1)];
      for (int o = 0; o < order; ++o)
        extended[o].insert(Gram(line.begin() + at - o - 1, line.begin() + at + 1));
    }
  }
  for (int o = 0; o < order; ++o)
    for (const Gram& gram : extended[o]) ++counts[o][Gram(gram.begin() + 1, gram.end())];

  double p = 1.0 / 257;
  for (int o = 0; o <= order; ++o) {
    std::map<double, double> n;
    for (const auto& [gram, count] : counts[o]) ++n[count];
    const double y = n[1] / (n[1] + 2 * n[2]);
    const auto discount = [&](double count) {
      if (count == 0) return 0.0;
      const double i = std::min(count, 3.0), value = i - (i + 1) * y * n[i + 1] / n[i];
      return value > 0 && value < i ? value : 0.5 * i;
    };
    const Gram used(context.end() - o, context.end());
    double total = 0, freed = 0, own = 0;
    for (const auto& [gram, count] : counts[o]) {
      if (!std::equal(used.begin(), used.end(), gram.begin())) continue;
      total += count;
      freed += discount(count);
      if (gram.back() == symbol) own = count;
    }
    if (total == 0) break;
    p = (own - discount(own)) / total + freed / total * p;
  }
  return p;
}

TEST(ByteModel, IsKneserNeyByItsDefinition) {
  const auto documents = some_documents(4, 60, 2);
  for (const int order : {0, 1, 3}) {
    const ByteModel model = learn(order, documents);
    for (const std::string context : {"", "a", "da", "cad", "b c", "zab", "zz"}) {
      std::vector<int> symbols(5, 256);
      for (const char byte : context) symbols.push_back(static_cast<unsigned char>(byte));
      for (const int symbol : {int('a'), int('b'), int(' '), int('z'), 0xff, 256})
        EXPECT_NEAR(model.probability(context, symbol),
                    by_definition(documents, order, symbols, symbol), 1e-13)
            << "order " << order << " P(" << symbol << " | \"" << context << "\")";
    }
  }
}

TEST(ByteModel, FindsTheEntropyOfKnownSources) {
  std::mt19937 random(3);
  const auto chance = [&](double p) { return static_cast<double>(random()) < p * 4294967296.0; };
  std::string biased, chain;
  for (int i = 0; i < 400000; ++i) biased += chance(0.25) ? 'x' : 'y';
  for (int i = 0; i < 400000; ++i) {  // the next letter is the xor of the last two, 9 times in 10
    const bool guess = i > 1 && chain[i - 1] != chain[i - 2];
    chain += "01"[chance(0.9) ? guess : !guess];
  }
  const auto bits = [](const std::string& text, int order) {
    const std::size_t half = text.size() / 2;
    return learn(order, {text.substr(0, half)}).bits(text.substr(half), false) /
           static_cast<double>(text.size() - half - 1);
  };
  const auto entropy = [](double p) { return -p * std::log2(p) - (1 - p) * std::log2(1 - p); };
  // 200,000 draws: the standard error of the mean is below 0.002.
  for (const int order : {0, 1, 3}) EXPECT_NEAR(bits(biased, order), entropy(0.25), 0.006) << order;
  EXPECT_NEAR(bits(chain, 2), entropy(0.9), 0.01);
  EXPECT_NEAR(bits(chain, 3), entropy(0.9), 0.01);
  // Without two letters of context there is almost nothing to see.
  EXPECT_GT(bits(chain, 0), 0.95);
}

TEST(ByteModel, ContextEndsAtTheDocument) {
  const ByteModel model = learn(3, std::vector<std::string>(50, "abc"));
  EXPECT_GT(model.probability("", 'a'), 0.95);
  EXPECT_GT(model.probability("abc", ByteModel::kEnd), 0.95);
  EXPECT_LT(model.probability("abc", 'a'), 0.03);
  // b, c and the end; not the first byte, which nothing predicts.
  EXPECT_LT(model.bits("abc"), 0.3);
  EXPECT_LT(model.bits("abc", false), model.bits("abc"));
  EXPECT_EQ(model.bits("q", false), 0);
}

TEST(GramCounts, CountsThroughGrowth) {
  GramCounts counts;
  std::map<std::uint64_t, std::uint32_t> expected;
  std::mt19937_64 random(4);
  for (int i = 0; i < 200000; ++i) {
    const std::uint64_t gram = random() % 30000 << (random() % 3 * 9);
    ++counts[gram];
    ++expected[gram];
  }
  EXPECT_EQ(counts.size(), expected.size());
  for (const auto& [gram, count] : expected) ASSERT_EQ(counts.find(gram), count);
  EXPECT_EQ(counts.find(31000), 0u);
}

class ByteBaselines : public testing::Test {
 protected:
  ByteBaselines() {
    fs::create_directories(folder_);
    DatasetInfo info{"bytes", 259, 256, 0.5, {}};
    for (const std::string split : {"train", "valid"}) {
      SplitWriter writer(folder_, split, 5000);
      for (const auto& text : some_documents(30, 500, split == "train" ? 5 : 6)) {
        auto ids = tokenizer_->encode(text);
        ids.push_back(256);
        EXPECT_TRUE(writer.add(ids, static_cast<std::int64_t>(text.size())).ok());
      }
      info.splits[split] = *writer.finish();
    }
    EXPECT_TRUE(write_dataset_info(folder_, info).ok());
  }
  ~ByteBaselines() override { fs::remove_all(folder_); }

  Result<ByteBaselineReport> run(const ByteBaselineOptions& options = {}) {
    EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(folder_));
    return byte_baselines(*dataset.split("train"), *dataset.split("valid"), *tokenizer_, options);
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-baselines-", ::getpid());
  const std::unique_ptr<Tokenizer> tokenizer_ = std::move(make_tokenizer("bytes")).value();
};

TEST_F(ByteBaselines, MoreContextPredictsBetterThanLess) {
  const auto report = run({.orders = {0, 1, 3}});
  ASSERT_TRUE(report.ok()) << report.status().message();
  ASSERT_EQ(report->baselines.size(), 4u);
  EXPECT_EQ(report->baselines[2].name, "order-3 bytes");
  EXPECT_LT(report->baselines[1].bits_per_byte, report->baselines[0].bits_per_byte - 0.2);
  EXPECT_LT(report->baselines[2].bits_per_byte, report->baselines[1].bits_per_byte - 0.2);
  // Five words of 2.6 bytes in the mean, drawn evenly: log2(5) / 2.6 = 0.89 bits a byte and nothing
  // below.
  EXPECT_GT(report->baselines[2].bits_per_byte, 0.85);
  EXPECT_EQ(report->baselines[3].name, "xz -9");
  EXPECT_TRUE(report->missing.empty());
  EXPECT_EQ(report->held_out_documents, 30);
  EXPECT_GE(report->held_out_bytes, 15000);
}

TEST_F(ByteBaselines, OnlySoManyHeldOutTokensAreRead) {
  const auto report = run({.orders = {0}, .xz = false, .held_out_tokens = 700});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->held_out_bytes, 699);  // one end of document
  EXPECT_EQ(report->held_out_documents, 2);
  ASSERT_EQ(report->baselines.size(), 1u);
  // The second document is cut: its end is not among what is predicted.
  const ByteModel model = learn(0, some_documents(30, 500, 5));
  const auto held_out = some_documents(30, 500, 6);
  const double bits =
      model.bits(held_out[0]) + model.bits(held_out[1].substr(0, 699 - held_out[0].size()), false);
  EXPECT_NEAR(report->baselines[0].bits_per_byte, bits / 699, 1e-12);
}

TEST_F(ByteBaselines, XzIsTheSizeOfItsOwnOutput) {
  std::string text;
  for (const auto& document : some_documents(100, 1000, 7)) text += document;
  const auto bytes = xz_bytes(text);
  ASSERT_TRUE(bytes.ok()) << bytes.status().message();
  EXPECT_LT(*bytes, static_cast<std::int64_t>(text.size()) / 4);
  EXPECT_GT(*bytes, static_cast<std::int64_t>(text.size()) / 12);  // 0.89 bits a byte at best
}

TEST_F(ByteBaselines, MissingXzIsReportedAndNotFatal) {
  const std::string path = std::getenv("PATH");
  ::setenv("PATH", "/nonexistent", 1);
  const auto report = run();
  ::setenv("PATH", path.c_str(), 1);
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->baselines.size(), 2u);
  EXPECT_NE(report->missing.find("xz"), std::string::npos);
}

TEST_F(ByteBaselines, OrderOutOfRangeIsRefused) {
  EXPECT_NE(run({.orders = {6}}).status().message().find("0 to 5"), std::string::npos);
}

}  // namespace
}  // namespace everlong
