#include "session/stream.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "models/checked_file.h"
#include "support/small_models.h"

namespace everlong {
namespace {

using test::describe;
using test::small_config;
using test::small_configs;
using test::small_model;
using test::TemporaryFolder;

using Tokens = std::vector<std::int32_t>;

constexpr double kSplit = tolerance::split_of(DType::kFloat64);
// Logits and scores leave a stream as fp32 numbers of order one.
constexpr double kFp32 = 1e-6;

Tokens random_tokens(std::size_t count, std::uint64_t seed = 3) {
  std::mt19937_64 generator(seed);
  Tokens tokens(count);
  for (auto& token : tokens) token = static_cast<std::int32_t>(generator() % 19);
  return tokens;
}

double difference(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return INFINITY;
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

Tokens generated(Stream& stream, int count, std::uint64_t seed = 5) {
  Sampler sampler({.seed = seed});
  Tokens tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(*stream.generate(sampler));
  return tokens;
}

// What one pass over all tokens without any state says: log probabilities of tokens 1.., then the
// last logits.
struct OnePass {
  std::vector<float> scores, logits;
};
OnePass one_pass(Decoder& model, const Tokens& tokens) {
  const at::NoGradGuard off;
  const std::vector<std::int64_t> ids(tokens.begin(), tokens.end());
  const at::Tensor ids_BT = at::tensor(ids, at::kLong).unsqueeze(0);
  const at::Tensor logits_TV = model.logits(model.hidden(ids_BT, {}, nullptr))[0].to(at::kDouble);
  const auto count = static_cast<std::int64_t>(ids.size());
  const at::Tensor scores = logits_TV.log_softmax(1)
                                .narrow(0, 0, count - 1)
                                .gather(1, ids_BT[0].slice(0, 1).unsqueeze(1));
  const auto list = [](const at::Tensor& t) {
    const at::Tensor plain = t.to(at::kFloat).contiguous();
    return std::vector<float>(plain.const_data_ptr<float>(),
                              plain.const_data_ptr<float>() + plain.numel());
  };
  return {list(scores), list(logits_TV[count - 1])};
}

TEST(Stream, AnyCutsAndChunksGiveWhatOnePassGives) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config);
    const Tokens tokens = random_tokens(41);
    const OnePass expected = one_pass(*model, tokens);
    std::mt19937_64 generator(7);
    for (const std::int64_t chunk : {1, 7, 64}) {
      for (int repeat = 0; repeat < 4; ++repeat) {
        Stream stream(model, chunk);
        for (std::size_t begin = 0; begin < tokens.size();) {
          const std::size_t length =
              std::min<std::size_t>(generator() % 20, tokens.size() - begin);  // 0 too
          ASSERT_TRUE(stream.feed(std::span(tokens).subspan(begin, length)).ok());
          begin += length;
        }
        EXPECT_EQ(stream.position(), 41);
        EXPECT_LT(difference(stream.logits(), expected.logits), kFp32)
            << describe(config) << ", chunk " << chunk;
      }
    }
  }
}

TEST(Stream, ScoresAreTheLogProbabilitiesOfOnePass) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config);
    const Tokens tokens = random_tokens(41);
    const OnePass expected = one_pass(*model, tokens);
    for (const std::int64_t chunk : {1, 7, 64}) {
      Stream stream(model, chunk);
      std::vector<float> scores;
      for (const auto& [begin, length] :
           std::vector<std::pair<std::size_t, std::size_t>>{{0, 1}, {1, 0}, {1, 22}, {23, 18}}) {
        const auto piece = stream.score(std::span(tokens).subspan(begin, length));
        ASSERT_TRUE(piece.ok()) << piece.status().message();
        scores.insert(scores.end(), piece->begin(), piece->end());
      }
      ASSERT_EQ(scores.size(), tokens.size());
      EXPECT_TRUE(std::isnan(scores[0]));
      EXPECT_LT(difference(std::span(scores).subspan(1), expected.scores), kFp32)
          << describe(config) << ", chunk " << chunk;
      EXPECT_LT(difference(stream.logits(), expected.logits), kFp32) << describe(config);
      EXPECT_EQ(stream.position(), 41);
    }
  }
}

TEST(Stream, GeneratedTokensAreFed) {
  const auto model = small_model(small_configs().back());
  Stream stream(model);
  Tokens all = random_tokens(5);
  ASSERT_TRUE(stream.feed(all).ok());
  for (const auto token : generated(stream, 6)) all.push_back(token);
  EXPECT_EQ(stream.position(), 11);
  EXPECT_LT(difference(stream.logits(), one_pass(*model, all).logits), kFp32);
}

TEST(Stream, GreedyTakesTheLargestLogit) {
  Stream stream(small_model(small_configs().back()));
  ASSERT_TRUE(stream.feed(random_tokens(5)).ok());
  const auto largest = std::ranges::max_element(stream.logits()) - stream.logits().begin();
  Sampler greedy({.temperature = 0});
  EXPECT_EQ(*stream.generate(greedy), largest);
}

TEST(Stream, AFreshStreamPredictsNothing) {
  Stream stream(small_model(small_configs().back()));
  Sampler sampler({});
  EXPECT_TRUE(stream.logits().empty());
  const auto token = stream.generate(sampler);
  ASSERT_FALSE(token.ok());
  EXPECT_NE(token.status().message().find("fresh stream"), std::string::npos);
}

TEST(Stream, IdsOutsideTheVocabularyAreRefusedBeforeAnyIsFed) {
  Stream stream(small_model(small_configs().back()), 2);
  ASSERT_TRUE(stream.feed(random_tokens(5)).ok());
  const std::vector<float> before(stream.logits().begin(), stream.logits().end());
  for (const std::int32_t bad : {-1, 19, 1 << 30}) {
    const Tokens tokens = {1, 2, 3, bad};
    EXPECT_NE(stream.feed(tokens).message().find(cat("id ", bad)), std::string::npos);
    EXPECT_FALSE(stream.score(tokens).ok());
  }
  EXPECT_EQ(stream.position(), 5);
  EXPECT_TRUE(same_bits(stream.logits(), before));
}

TEST(Stream, AForkAndItsOriginGoOnIndependently) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config, at::kFloat);
    Stream stream(model);
    ASSERT_TRUE(stream.feed(random_tokens(9)).ok());
    Stream fork = stream.clone(), second = stream.clone();
    const Tokens expected = generated(second, 12);
    ASSERT_TRUE(fork.feed(random_tokens(6, 8)).ok());
    EXPECT_EQ(stream.position(), 9);
    EXPECT_EQ(generated(stream, 12), expected) << describe(config);
    EXPECT_EQ(fork.position(), 15);
    EXPECT_EQ(generated(fork, 12), [&] {
      Stream alone(model);
      EXPECT_TRUE(alone.feed(random_tokens(9)).ok());
      EXPECT_TRUE(alone.feed(random_tokens(6, 8)).ok());
      return generated(alone, 12);
    }()) << describe(config);
  }
}

TEST(Stream, ResetForgetsEverything) {
  for (const auto& config : small_configs()) {
    const auto model = small_model(config, at::kFloat);
    Stream stream(model), fresh(model);
    ASSERT_TRUE(stream.feed(random_tokens(9)).ok());
    stream.reset();
    EXPECT_EQ(stream.position(), 0);
    EXPECT_TRUE(stream.logits().empty());
    ASSERT_TRUE(stream.feed(random_tokens(7, 4)).ok());
    ASSERT_TRUE(fresh.feed(random_tokens(7, 4)).ok());
    EXPECT_TRUE(same_bits(stream.logits(), fresh.logits())) << describe(config);
  }
}

TEST(Stream, StateBytesKeepTheirBound) {
  for (const auto& config : small_configs()) {
    Stream stream(small_model(config, at::kFloat));
    for (int i = 0; i < 5; ++i) {
      EXPECT_LE(stream.state_bytes(), stream.state_bytes_bound())
          << describe(config) << " at " << stream.position();
      ASSERT_TRUE(stream.feed(random_tokens(1 + 40 * i)).ok());
    }
  }
}

TEST(StreamFile, ContinuesBitForBitInAFreshlyLoadedModel) {
  for (const auto& config : small_configs()) {
    const TemporaryFolder folder("stream_file");
    ASSERT_TRUE(save_model(folder.path(), *small_model(config, at::kFloat), {}).ok());
    const auto model = *load_model(folder.path(), at::kCPU, at::kFloat);
    Stream stream(model);
    ASSERT_TRUE(stream.feed(random_tokens(23)).ok());
    ASSERT_TRUE(stream.save(folder / "s.safetensors").ok());
    const Tokens expected = generated(stream, 40);

    Stream other(*load_model(folder.path(), at::kCPU, at::kFloat));
    ASSERT_TRUE(other.feed(random_tokens(4, 9)).ok());  // what it held is replaced
    const Status status = other.load(folder / "s.safetensors");
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(other.position(), 23);
    EXPECT_EQ(generated(other, 40), expected) << describe(config);
    EXPECT_TRUE(same_bits(other.logits(), stream.logits())) << describe(config);
  }
}

TEST(StreamFile, AFreshStreamSavesAndLoads) {
  const TemporaryFolder folder("stream_fresh");
  const auto model = small_model(small_configs().back(), at::kFloat);
  ASSERT_TRUE(Stream(model).save(folder / "s.safetensors").ok());
  Stream stream(model);
  ASSERT_TRUE(stream.feed(random_tokens(4)).ok());
  ASSERT_TRUE(stream.load(folder / "s.safetensors").ok());
  EXPECT_EQ(stream.position(), 0);
  EXPECT_TRUE(stream.logits().empty());
}

TEST(StreamFile, NotesTravelUnread) {
  const TemporaryFolder folder("stream_notes");
  const auto model = small_model(small_configs().back(), at::kFloat);
  Stream stream(model);
  const std::map<std::string, std::string> notes = {{"position", "not the stream's"},
                                                    {"empty", ""}};
  ASSERT_TRUE(stream.feed(random_tokens(4)).ok());
  ASSERT_TRUE(stream.save(folder / "s.safetensors", notes).ok());
  std::map<std::string, std::string> read = {{"old", "goes"}};
  ASSERT_TRUE(stream.load(folder / "s.safetensors", &read).ok());
  EXPECT_EQ(read, notes);
  EXPECT_EQ(stream.position(), 4);
}

constexpr const char* kStreamFormat = "everlong-stream-2";

// Every refusal names its reason and leaves the stream as it was.
class RefusedStreamFile : public ::testing::Test {
 protected:
  RefusedStreamFile()
      : model_(small_model(small_configs().back(), at::kFloat)),
        stream_(model_),
        folder_("stream_refused") {
    EXPECT_TRUE(stream_.feed(random_tokens(9)).ok());
    EXPECT_TRUE(stream_.save(path()).ok());
    EXPECT_TRUE(stream_.feed(random_tokens(4, 6)).ok());
    logits_.assign(stream_.logits().begin(), stream_.logits().end());
    Stream twin = stream_.clone();
    expected_ = generated(twin, 10);
  }
  fs::path path() const { return folder_ / "s.safetensors"; }

  template <class Change>
  void rewrite(const Change& change) {
    auto file = read_checked(path(), kStreamFormat, "a stream file");
    ASSERT_TRUE(file.ok());
    change(*file);
    ASSERT_TRUE(write_checked(path(), *file, kStreamFormat).ok());
  }
  void expect_refused(std::string_view part) {
    const Status status = stream_.load(path());
    ASSERT_FALSE(status.ok()) << part;
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
    EXPECT_NE(status.message().find(path().string()), std::string::npos) << status.message();
    expect_untouched();
  }
  void expect_untouched() {
    EXPECT_EQ(stream_.position(), 13);
    EXPECT_TRUE(same_bits(stream_.logits(), logits_));
    Stream twin = stream_.clone();
    EXPECT_EQ(generated(twin, 10), expected_);
  }

  std::shared_ptr<Decoder> model_;
  Stream stream_;
  TemporaryFolder folder_;
  std::vector<float> logits_;
  Tokens expected_;
};

TEST_F(RefusedStreamFile, OfAnotherModel) {
  Stream other(small_model(small_configs().back(), at::kFloat, /*seed=*/2));
  ASSERT_TRUE(other.feed(random_tokens(9)).ok());
  ASSERT_TRUE(other.save(path()).ok());
  expect_refused(fingerprint(other.model()));
  expect_refused(fingerprint(*model_));
}

TEST_F(RefusedStreamFile, OfAnotherFormat) {
  const auto original = *load_tensors(path());
  auto metadata = original.metadata;
  metadata["format"] = "everlong-stream-1";
  ASSERT_TRUE(save_tensors(path(), original.tensors, metadata).ok());
  expect_refused("everlong-stream-1");
  ASSERT_TRUE(save_tensors(path(), original.tensors, {}).ok());
  expect_refused(kStreamFormat);
}

TEST_F(RefusedStreamFile, WithABrokenPosition) {
  for (const char* position : {"", "-1", "9K", "09", " 9", "99999999999999999999"}) {
    rewrite([&](TensorFile& file) { file.metadata["position"] = position; });
    expect_refused("position");
  }
  rewrite([](TensorFile& file) { file.metadata["position"] = "0"; });
  expect_refused("position 0");
}

TEST_F(RefusedStreamFile, WithTensorsThatDoNotFit) {
  const auto original = *read_checked(path(), kStreamFormat, "a stream file");
  for (const auto& [name, tensor] : original.tensors) {
    rewrite([&](TensorFile& file) { file.tensors.erase(name); });
    expect_refused(name == "logits" ? "logits" : "layer");
    rewrite([&](TensorFile& file) {
      file.tensors = original.tensors;
      file.tensors[name] = at::zeros({1, 2, 3, 4, 5, 6, 7});
    });
    expect_refused(name == "logits" ? "logits" : "layer");
    rewrite([&](TensorFile& file) { file.tensors = original.tensors; });
  }
  rewrite([](TensorFile& file) { file.tensors["layers.7.S"] = at::zeros({1}); });
  expect_refused("layers.7.S");
}

// No byte of the file may change what is loaded: header, numbers, position.
TEST_F(RefusedStreamFile, WithAChangedByte) {
  const std::string whole = *read_file(path());
  for (const std::size_t at : {whole.find("\"position\":\"") + 12, whole.size() - 1,
                               whole.size() - 500, whole.size() - 1000}) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    ASSERT_TRUE(write_file(path(), changed).ok());
    expect_refused("checksum");
  }
}

TEST_F(RefusedStreamFile, CutShort) {
  const auto whole = read_file(path());
  ASSERT_TRUE(whole.ok());
  for (std::size_t size = 0; size < whole->size(); size += 97) {
    ASSERT_TRUE(write_file(path(), std::string_view(*whole).substr(0, size)).ok());
    ASSERT_FALSE(stream_.load(path()).ok()) << size;
  }
  expect_refused("bytes");
  fs::remove(path());
  EXPECT_EQ(stream_.load(path()).code(), StatusCode::kNotFound);
  expect_untouched();
}

}  // namespace
}  // namespace everlong
