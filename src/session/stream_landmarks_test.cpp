#include "session/landmarks.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/random.h"
#include "data/landmarks.h"
#include "models/checkpoint.h"
#include "session/stream.h"
#include "support/small_models.h"

namespace everlong {
namespace {

using test::small_config;
using test::small_model;
using test::TemporaryFolder;

using Tokens = std::vector<std::int32_t>;

constexpr std::int32_t kLandmark = 18;
constexpr std::int64_t kBlock = 8;  // of the room's example settings
// Logits and scores leave a stream as fp32 numbers of order one.
constexpr double kFp32 = 1e-6;

Tokens text(std::int64_t tokens, std::uint64_t seed = 3) {
  Random random{seed};
  Tokens ids(static_cast<std::size_t>(tokens));
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(kLandmark));
  return ids;
}

ModelConfig config(bool predicted) {
  // Beside a mixer that takes landmarks for tokens like others.
  ModelConfig config = small_config("llama", {"landmark", "lightning"});
  config.landmark_id = kLandmark;
  config.landmark_predicted = predicted;
  return config;
}

// The text with landmarks, as the data has them.
Tokens inserted(const Tokens& text, bool predicted) {
  Tokens marked;
  LandmarkInserter(kBlock, kLandmark, predicted).insert(text, marked);
  return marked;
}

// fp64 [T, vocab] log probabilities of one pass over tokens that have their landmarks.
at::Tensor log_probabilities(Decoder& model, const Tokens& marked) {
  const at::NoGradGuard off;
  const std::vector<std::int64_t> ids(marked.begin(), marked.end());
  const at::Tensor ids_BT = at::tensor(ids, at::kLong).unsqueeze(0);
  return model.logits(model.hidden(ids_BT, {}, nullptr))[0].to(at::kDouble).log_softmax(1);
}

TEST(Landmarks, LieWhereTheDataPutsThemWhateverTheCut) {
  for (const auto& [predicted, tokens] : std::vector<std::pair<bool, std::int64_t>>{
           {false, 40}, {true, 40}, {false, 42}, {true, 42}}) {
    const LandmarkRule rule(kBlock, kLandmark, predicted);
    const Tokens ids = text(tokens);  // 42: the last block is full
    const Tokens wanted = inserted(ids, predicted);
    for (const std::size_t piece : {1, 6, 7, 8, 42}) {
      Tokens got;
      std::vector<std::int64_t> from;
      for (std::size_t at = 0; at < ids.size(); at += piece) {
        const auto part = std::span(ids).subspan(at, std::min(piece, ids.size() - at));
        const auto marked = rule.mark(part, std::ssize(got));
        got.insert(got.end(), marked.ids.begin(), marked.ids.end());
        for (const std::int64_t i : marked.from)
          from.push_back(i < 0 ? i : i + static_cast<std::int64_t>(at));
      }
      EXPECT_EQ(got, wanted) << piece;
      EXPECT_EQ(rule.text_tokens(std::ssize(got)), tokens);
      for (std::size_t i = 0; i < got.size(); ++i)
        EXPECT_EQ(got[i], from[i] < 0 ? kLandmark : ids[static_cast<std::size_t>(from[i])]);
    }
    // Those that a text brings, in their place or not, change nothing.
    EXPECT_EQ(rule.mark(wanted, 0).ids, wanted);
    EXPECT_EQ(rule.mark(Tokens{kLandmark, 1, kLandmark, kLandmark, 2}, 0).ids, (Tokens{1, 2}));
  }
}

TEST(Landmarks, AreForModelsThatHaveThem) {
  EXPECT_TRUE(LandmarkRule::of(config(true)).has_value());
  ModelConfig none = config(true);
  none.landmark_id = -1;
  EXPECT_FALSE(LandmarkRule::of(none).has_value());
  ModelConfig other = small_config("llama", {"softmax"});
  other.landmark_id = kLandmark;
  EXPECT_FALSE(LandmarkRule::of(other).has_value()) << "no layer says how long a block is";
}

TEST(Landmarks, AStreamPlacesThemAndScoresTheTextAlone) {
  for (const auto& [predicted, tokens] : std::vector<std::pair<bool, std::int64_t>>{
           {false, 45}, {true, 45}, {false, 42}, {true, 42}}) {
    const auto model = small_model(config(predicted));
    const Tokens ids = text(tokens), marked = inserted(ids, predicted);
    const at::Tensor wanted = log_probabilities(*model, marked);
    // The row whose prediction counts for each token of the text.
    std::vector<std::int64_t> speakers;
    std::int64_t speaker = -1;
    for (std::size_t i = 0; i < marked.size(); ++i) {
      if (marked[i] != kLandmark) speakers.push_back(speaker);
      if (marked[i] != kLandmark || predicted) speaker = static_cast<std::int64_t>(i);
    }
    for (const std::int64_t chunk : {1, 5, 64})
      for (const std::size_t piece : {1, 7, 16, 45}) {
        Stream scoring(model, chunk), feeding(model, chunk);
        for (std::size_t at = 0; at < ids.size(); at += piece) {
          const auto part = std::span(ids).subspan(at, std::min(piece, ids.size() - at));
          const auto scores = scoring.score(part);
          ASSERT_TRUE(scores.ok()) << scores.status().message();
          ASSERT_TRUE(feeding.feed(part).ok());
          for (std::size_t i = 0; i < scores->size(); ++i) {
            const std::int64_t row = speakers[at + i];
            if (row < 0)
              EXPECT_TRUE(std::isnan((*scores)[i]));
            else
              EXPECT_NEAR((*scores)[i], wanted[row][ids[at + i]].item<double>(), kFp32)
                  << predicted << " " << chunk << " " << piece << " token " << at + i;
          }
        }
        EXPECT_EQ(scoring.position(), std::ssize(marked));
        EXPECT_EQ(scoring.text_position(), tokens);
        for (const Stream* stream : {&scoring, &feeding}) {
          const at::Tensor last =
              at::tensor(stream->logits(), at::kFloat).to(at::kDouble).log_softmax(0);
          EXPECT_LT((last - wanted[speaker]).abs().max().item<double>(), kFp32);
        }
      }
    // A landmark in the text has no score and changes none.
    Tokens with = ids;
    with.insert(with.begin() + 20, kLandmark);
    Stream plain(model), bringing(model);
    auto scores = *plain.score(ids), others = *bringing.score(with);
    EXPECT_TRUE(std::isnan(others[20]));
    others.erase(others.begin() + 20);
    for (std::size_t i = 1; i < scores.size(); ++i) EXPECT_EQ(scores[i], others[i]);
  }
}

TEST(Landmarks, AreNeverDrawnAndComeByThemselves) {
  for (const bool predicted : {false, true}) {
    const auto model = small_model(config(predicted));
    {
      const at::NoGradGuard off;  // the landmark is what the model likes best, everywhere
      model->head_weight().select(0, kLandmark).copy_(model->head_weight().sum(0) * 20);
    }
    for (const std::uint64_t seed : {1, 2}) {
      Stream stream(model);
      ASSERT_TRUE(stream.feed(text(5)).ok());
      Sampler sampler({.temperature = 2, .seed = seed});
      Tokens all = text(5);
      for (int i = 0; i < 40; ++i) {
        all.push_back(*stream.generate(sampler));
        EXPECT_NE(all.back(), kLandmark);
      }
      EXPECT_EQ(stream.text_position(), 45);
      EXPECT_EQ(stream.position(), std::ssize(inserted(all, predicted)));
      // A text that was written reads as one that was fed.
      Stream reading(model);
      ASSERT_TRUE(reading.feed(all).ok());
      for (std::size_t i = 0; i < reading.logits().size(); ++i)
        EXPECT_NEAR(reading.logits()[i], stream.logits()[i],
                    kFp32 * (1 + std::abs(stream.logits()[i])));
    }
  }
}

TEST(Landmarks, ASavedStreamGoesOnInTheMiddleOfABlock) {
  const TemporaryFolder folder("landmarks");
  const auto model = small_model(config(false), at::kFloat);
  for (const std::int64_t cut : {6, 7, 8}) {
    const Tokens ids = text(30);
    const auto part = std::span(ids);
    Stream whole(model);
    ASSERT_TRUE(whole.feed(part.first(static_cast<std::size_t>(cut))).ok());
    ASSERT_TRUE(whole.save(folder / "state").ok());
    Stream other(model);
    ASSERT_TRUE(other.load(folder / "state").ok());
    EXPECT_EQ(other.text_position(), cut);
    for (Stream* stream : {&whole, &other})
      ASSERT_TRUE(stream->feed(part.subspan(static_cast<std::size_t>(cut))).ok());
    EXPECT_EQ(other.position(), whole.position());
    EXPECT_TRUE(std::ranges::equal(other.logits(), whole.logits()));
  }
}

// A model of plain attention, read in blocks: the same weights as layers of landmark attention.
TEST(Landmarks, PlainModelsReadBlocksWithoutThem) {
  ModelConfig plain = small_config("llama", {"softmax", "softmax"});
  plain.mechanisms["softmax"] = {{"num_heads", 2}, {"head_dim", 8}};
  const auto dense = small_model(plain);
  ModelConfig blocks = plain;
  blocks.layer_types = {"landmark", "landmark"};
  blocks.mechanisms = {
      {"landmark", {{"num_heads", 2}, {"head_dim", 8}, {"block", 5}, {"score", "mean"}}}};
  const Tokens ids = text(60);
  const auto logits = [&](const nlohmann::json& reading) {
    ModelConfig config = blocks;
    config.mechanisms["landmark"].update(reading);
    const auto model = small_model(config);
    const at::NoGradGuard off;
    for (auto& parameter : model->named_parameters())
      parameter.value().copy_(dense->named_parameters()[parameter.key()]);
    Stream stream(model);
    EXPECT_TRUE(stream.feed(ids).ok());
    EXPECT_EQ(stream.position(), 60);
    return std::vector<float>(stream.logits().begin(), stream.logits().end());
  };
  Stream stream(dense);
  ASSERT_TRUE(stream.feed(ids).ok());
  for (const nlohmann::json& all :
       {nlohmann::json{{"top_k", 0}}, {{"top_k", 50}}, {{"top_k", 50}, {"score", "max"}}})
    for (std::size_t i = 0; i < 19; ++i) EXPECT_NEAR(logits(all)[i], stream.logits()[i], kFp32);
  double changed = 0;
  const auto few = logits({{"top_k", 1}});
  for (std::size_t i = 0; i < 19; ++i)
    changed = std::max(changed, std::abs(double{few[i]} - stream.logits()[i]));
  EXPECT_GT(changed, 1e-3);
}

}  // namespace
}  // namespace everlong
