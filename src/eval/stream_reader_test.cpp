#include "eval/stream_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "support/small_models.h"

namespace everlong {
namespace {

using test::small_config;
using test::small_model;

constexpr std::int32_t kLandmark = 18;

std::vector<std::int32_t> text(std::int64_t tokens) {
  Random random{3};
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(kLandmark));
  return ids;
}

std::int32_t likeliest(const Stream& stream) {
  const auto logits = stream.logits();
  return static_cast<std::int32_t>(std::ranges::max_element(logits) - logits.begin());
}

TEST(StreamReader, PredictsWhatTheStreamDoes) {
  const auto model = small_model(small_config("llama", {"softmax", "lightning"}));
  Stream stream(model), other(model);
  StreamReader reader(stream);
  EXPECT_FALSE(reader.predict().ok());
  const auto ids = text(50);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ASSERT_TRUE(reader.feed(std::span(ids).subspan(i, 1)).ok());
    ASSERT_TRUE(other.feed(std::span(ids).subspan(i, 1)).ok());
    EXPECT_EQ(*reader.predict(), likeliest(other));
  }
  EXPECT_EQ(reader.state_bytes(), other.state_bytes());
  reader.reset();
  EXPECT_EQ(stream.position(), 0);
  EXPECT_FALSE(reader.feed(std::vector<std::int32_t>{19}).ok());
}

// The text is fed without landmarks; the model sees it with them.
TEST(StreamReader, InsertsTheLandmarksOfTheModel) {
  for (const bool predicted : {false, true}) {
    auto config = small_config("llama", {"landmark"});
    const std::int64_t block = config.mechanisms.at("landmark").value("block", 64);
    config.landmark_id = kLandmark;
    config.landmark_predicted = predicted;
    const auto model = small_model(config);
    const auto ids = text(3 * block);
    for (const std::int64_t piece : {std::int64_t{1}, block, 3 * block}) {
      Stream stream(model), other(model);
      StreamReader reader(stream);
      for (const int round : {0, 1}) {  // reset() begins a block
        reader.reset();
        other.reset();
        std::vector<std::int32_t> marked;
        LandmarkInserter inserter(block, kLandmark, predicted);
        for (std::int64_t at = 0; at + piece <= std::ssize(ids) - round; at += piece) {
          const auto part =
              std::span(ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(piece));
          marked.clear();
          inserter.insert(part, marked);
          ASSERT_TRUE(reader.feed(part).ok());
          ASSERT_TRUE(other.feed(marked).ok());
          EXPECT_EQ(*reader.predict(), likeliest(other));
        }
        EXPECT_EQ(stream.position(), other.position());
        if (round == 0) {
          const std::int64_t blocks = (3 * block - (predicted ? 0 : 1)) / (block - 1);
          EXPECT_EQ(stream.position(), 3 * block + blocks);
        }
      }
    }
  }
}

TEST(StreamReader, RefusesNumbersThatAreNone) {
  const auto model = small_model(small_config("llama", {"softmax"}));
  {
    const at::NoGradGuard off;
    model->head_weight().select(0, 7).fill_(std::nan(""));
  }
  Stream stream(model);
  StreamReader reader(stream);
  ASSERT_TRUE(reader.feed(text(5)).ok());
  const auto said = reader.predict();
  ASSERT_FALSE(said.ok());
  EXPECT_NE(said.status().message().find("NaN"), std::string::npos);
}

}  // namespace
}  // namespace everlong
