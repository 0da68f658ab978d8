#include "data/word_tokenizer.h"

#include <gtest/gtest.h>

#include <set>

namespace everlong {
namespace {

TEST(WordTokenizer, CountsWordsDigitsAndMarks) {
  const auto words = make_word_tokenizer();
  EXPECT_EQ(words->encode("The pass key is 40173. Remember it. 40173 is the pass key.").size(),
            23u);
  EXPECT_EQ(words->encode("What is the pass key? The pass key is ").size(), 10u);
  EXPECT_EQ(words->encode("There is important info hidden here. Find it and memorize it.").size(),
            13u);
}

TEST(WordTokenizer, TextOfIdsEncodesToThemAgain) {
  const auto words = make_word_tokenizer();
  std::vector<std::int32_t> all;
  for (std::int32_t id = 3; id < words->vocab_size(); ++id) all.push_back(id);
  EXPECT_EQ(words->encode(words->decode(all)), all);
  EXPECT_EQ(std::set<std::int32_t>(all.begin(), all.end()).size(), all.size());
}

// Weights depend on these numbers: a list that changes makes every trained model useless.
TEST(WordTokenizer, IdsStayWhatTheyAre) {
  const auto words = make_word_tokenizer();
  EXPECT_EQ(words->vocab_size(), 86);
  EXPECT_EQ(words->eod(), 0);
  EXPECT_EQ(words->bod(), 1);
  EXPECT_EQ(words->pad(), 2);
  EXPECT_EQ(words->encode("unheard-of 0 9 . _ there again pass hold fox cod a p"),
            (std::vector<std::int32_t>{3, 3, 47, 4, 13, 14, 18, 19, 39, 40, 53, 54, 69, 70, 85}));
}

TEST(WordTokenizer, CaseAndWhiteSpaceDoNotCount) {
  const auto words = make_word_tokenizer();
  EXPECT_EQ(words->encode(" THE\n\tGrass "), words->encode("the grass"));
  EXPECT_EQ(words->encode(" \n"), std::vector<std::int32_t>{});
  EXPECT_EQ(words->decode(words->encode("The  Grass,is 12")), "the grass , is 1 2");
}

TEST(WordTokenizer, SpecialsHaveNoTextAndNoTextHasTheirIds) {
  const auto words = make_word_tokenizer();
  EXPECT_EQ(words->decode(std::vector<std::int32_t>{0, 1, 2, -1, 86, 1000}), "");
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes += {static_cast<char>(byte), ' '};
  for (const auto id : words->encode(bytes)) EXPECT_GE(id, 3);
}

}  // namespace
}  // namespace everlong
