#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "eval/streaming.h"
#include "support/small_models.h"

namespace everlong {
namespace {

std::unique_ptr<Tokenizer> bytes() { return *make_tokenizer("bytes"); }

TEST(PositionBuckets, GrowByFourAndCountWhatWasPredicted) {
  const auto tokenizer = bytes();
  const std::vector<std::int32_t> ids(5000, 'a');
  std::vector<float> scores(5000, -0.5f);
  scores[0] = NAN;
  PositionBuckets buckets;
  buckets.add(0, ids, scores, *tokenizer);
  ASSERT_EQ(buckets.buckets().size(), 3u);
  EXPECT_EQ(buckets.buckets()[0].tokens, 1023);
  EXPECT_EQ(buckets.buckets()[0].bytes, 1023);
  EXPECT_EQ(buckets.buckets()[1].begin, 1024);
  EXPECT_EQ(buckets.buckets()[1].tokens, 4096 - 1024);
  EXPECT_EQ(bucket_name(buckets.buckets()[2]), "4K-16K");
  EXPECT_EQ(buckets.buckets()[2].tokens, 5000 - 4096);
  EXPECT_EQ(buckets.total().tokens, 4999);
  EXPECT_DOUBLE_EQ(buckets.total().nats, 0.5 * 4999);
  EXPECT_DOUBLE_EQ(buckets.total().bits_per_byte(), 0.5 / std::numbers::ln2);
}

TEST(PositionBuckets, EndOfDocumentCostsNatsButIsNoText) {
  const auto tokenizer = bytes();
  const std::vector<std::int32_t> ids = {'a', tokenizer->eod()};
  PositionBuckets buckets;
  buckets.add(100, ids, std::vector<float>{-1, -3}, *tokenizer);
  EXPECT_EQ(buckets.total().tokens, 2);
  EXPECT_EQ(buckets.total().bytes, 1);
  EXPECT_DOUBLE_EQ(buckets.total().bits_per_byte(), 4 / std::numbers::ln2);
}

TEST(PositionBuckets, PiecesAddUpInAnyOrderOfPositions) {
  const auto tokenizer = bytes();
  const std::vector<std::int32_t> ids(10, 'a');
  const std::vector<float> scores(10, -1.0f);
  PositionBuckets buckets;
  buckets.add(5000, ids, scores, *tokenizer);
  buckets.add(0, ids, scores, *tokenizer);
  buckets.add(1020, ids, scores, *tokenizer);
  ASSERT_EQ(buckets.buckets().size(), 3u);
  EXPECT_EQ(buckets.buckets()[0].tokens, 14);
  EXPECT_EQ(buckets.buckets()[1].tokens, 6);
  EXPECT_EQ(buckets.buckets()[2].tokens, 10);
}

class OverText : public testing::Test {
 protected:
  void SetUp() override {
    std::string text;
    for (int i = 0; i < 3000; ++i) text += static_cast<char>(i * i % 11);
    ASSERT_TRUE(write_file(folder_ / "text", text).ok());
    source_.emplace(*TokenSource::from_text(folder_ / "text", *tokenizer_));
    auto config = test::small_config("transnormer", {"lightning", "softmax"});
    model_ = test::small_model(config);
  }
  PerplexityReport measure(const PerplexityOptions& options) {
    Stream stream(model_, 512);
    auto report = perplexity(stream, *source_, *tokenizer_, options, {});
    EXPECT_TRUE(report.ok()) << report.status().message();
    return *std::move(report);
  }

  test::TemporaryFolder folder_{"perplexity"};
  std::unique_ptr<Tokenizer> tokenizer_ = bytes();
  std::optional<TokenSource> source_;
  std::shared_ptr<Decoder> model_;
};

TEST_F(OverText, PerplexityDoesNotDependOnTheFeedAndResetsWhereAsked) {
  const auto whole = measure({});
  EXPECT_EQ(whole.total.tokens, 2999);
  EXPECT_NEAR(measure({.feed = 7}).total.nats, whole.total.nats, 1e-3)
      << "fp32 scores of a double model";
  const auto reset = measure({.feed = 64, .reset_every = 100});
  EXPECT_EQ(reset.resets, 29);
  EXPECT_EQ(reset.total.tokens, 2970);
  EXPECT_EQ(reset.buckets.size(), 1u);
  EXPECT_GT(std::abs(reset.total.nats_per_token() - whole.total.nats_per_token()), 1e-3)
      << "forgetting changed nothing";
  EXPECT_EQ(measure({.max_tokens = 500}).total.tokens, 499);
}

// The stream that is measured is the stream that predicts: same scores, and bytes of state as the
// stream says.
TEST_F(OverText, StreamingMeasuresTheStreamItself) {
  Stream stream(model_, 512);
  const StreamingOptions options{
      .tokens = 3000, .feed = 128, .marks = {100, 1000, 9999}, .rounds = 1};
  const auto report = measure_streaming(stream, *source_, *tokenizer_, options, {});
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_NEAR(report->total.nats, measure({}).total.nats, 1e-3);
  ASSERT_EQ(report->marks.size(), 2u) << "a mark beyond the end is left out";
  EXPECT_EQ(report->marks[1].tokens, 1000);
  for (const auto& mark : report->marks) {
    Stream same(model_, 512);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(mark.tokens));
    ASSERT_TRUE(source_->read(0, ids).ok());
    ASSERT_TRUE(same.feed(ids).ok());
    EXPECT_EQ(mark.state_bytes, same.state_bytes());
    EXPECT_EQ(mark.speed.repeats, 1);
  }
  std::int64_t end = 0;
  for (const auto& window : report->windows) {
    EXPECT_EQ(window.begin, end) << "windows leave no token out";
    end = window.end;
  }
  EXPECT_EQ(end, 3000);
  EXPECT_EQ(stream.position(), 3000);
  EXPECT_FALSE(measure_streaming(stream, *source_, *tokenizer_, {.tokens = 3001}, {}).ok());
}

}  // namespace
}  // namespace everlong
