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

// The stream places them (session/stream_landmarks_test.cpp); they are no answer either.
TEST(StreamReader, NeverAnswersWithALandmark) {
  auto config = small_config("llama", {"landmark"});
  config.landmark_id = kLandmark;
  const auto model = small_model(config);
  Stream stream(model), other(model);
  StreamReader reader(stream);
  std::int64_t liked = 0;  // positions where the landmark has the largest logit
  for (const std::int32_t id : text(200)) {
    ASSERT_TRUE(reader.feed({&id, 1}).ok());
    ASSERT_TRUE(other.feed({&id, 1}).ok());
    std::vector<float> logits(other.logits().begin(), other.logits().end());
    liked += likeliest(other) == kLandmark;
    logits[kLandmark] = -INFINITY;
    EXPECT_EQ(*reader.predict(), std::ranges::max_element(logits) - logits.begin());
  }
  EXPECT_GT(liked, 0) << "or this tests nothing";
  EXPECT_EQ(stream.text_position(), 200);
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
