#include "data/tokenizer.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

std::unique_ptr<Tokenizer> bytes() { return std::move(make_tokenizer("bytes")).value(); }

TEST(Tokenizer, EveryByteComesBack) {
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all.push_back(static_cast<char>(byte));
  const auto tokenizer = bytes();
  const auto ids = tokenizer->encode(all);
  ASSERT_EQ(ids.size(), 256u);
  for (int byte = 0; byte < 256; ++byte) EXPECT_EQ(ids[byte], byte);
  EXPECT_EQ(tokenizer->decode(ids), all);
}

TEST(Tokenizer, EncodingAppends) {
  const auto tokenizer = bytes();
  std::vector<std::int32_t> ids = {7};
  tokenizer->encode("ab", ids);
  tokenizer->encode("", ids);
  tokenizer->encode("c", ids);
  EXPECT_EQ(ids, (std::vector<std::int32_t>{7, 'a', 'b', 'c'}));
}

TEST(Tokenizer, SpecialsAreDistinctInTheVocabularyAndHaveNoText) {
  const auto tokenizer = bytes();
  EXPECT_EQ(tokenizer->eod(), 256);
  EXPECT_EQ(tokenizer->bod(), 257);
  EXPECT_EQ(tokenizer->pad(), 258);
  EXPECT_EQ(tokenizer->vocab_size(), 259);
  EXPECT_EQ(tokenizer->decode(std::vector<std::int32_t>{257, 'a', 258, 'b', 256, 259, -1}), "ab");
}

TEST(Tokenizer, UnknownNameSaysWhatIsKnown) {
  const auto result = make_tokenizer("byte");
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().message(),
            "tokenizer \"byte\" is not known; known: bytes, words, or a path to a "
            "tokenizer.json or a tokenizer.model");
}

}  // namespace
}  // namespace everlong
