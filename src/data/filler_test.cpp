#include "data/filler.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace everlong {
namespace {

std::unique_ptr<Tokenizer> tokenizer(const char* name) { return *make_tokenizer(name); }

std::vector<std::int32_t> read(const Filler& filler, std::uint64_t seed, std::int64_t count,
                               std::int64_t piece) {
  auto stretch = filler.stretch(seed);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t at = 0; at < ids.size(); at += static_cast<std::size_t>(piece))
    EXPECT_TRUE(stretch
                    .next(std::span(ids).subspan(
                        at, std::min(ids.size() - at, static_cast<std::size_t>(piece))))
                    .ok());
  return ids;
}

Filler text_filler() {
  return *Filler::from_text({7, [](std::int64_t position, std::span<std::int32_t> out) -> Status {
                               for (auto& id : out) id = static_cast<std::int32_t>(position++);
                               return {};
                             }});
}

TEST(Filler, DoesNotDependOnHowItIsCut) {
  for (const char* name : {"bytes", "words"}) {
    const auto ids = tokenizer(name);
    for (const FillerKind kind :
         {FillerKind::kSentences, FillerKind::kShuffled, FillerKind::kWords, FillerKind::kDigits}) {
      const auto filler = *Filler::make(kind, *ids);
      EXPECT_EQ(read(filler, 5, 1000, 1000), read(filler, 5, 1000, 7));
      EXPECT_EQ(read(filler, 5, 100, 100) == read(filler, 6, 100, 100),
                kind == FillerKind::kSentences);
    }
  }
  EXPECT_EQ(read(text_filler(), 5, 50, 50), read(text_filler(), 5, 50, 3));
}

TEST(Filler, SentencesAreTheKnownOnes) {
  const auto bytes = tokenizer("bytes");
  const auto filler = *Filler::make(FillerKind::kSentences, *bytes);
  const std::string expected =
      " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
      " The grass";
  EXPECT_EQ(bytes->decode(read(filler, 1, std::ssize(expected), 64)), expected);
}

TEST(Filler, OnlyDigitsAndTextsHoldDigits) {
  const auto bytes = tokenizer("bytes");
  for (const FillerKind kind :
       {FillerKind::kSentences, FillerKind::kShuffled, FillerKind::kWords, FillerKind::kDigits}) {
    const auto filler = *Filler::make(kind, *bytes);
    const std::string text = bytes->decode(read(filler, 3, 5000, 512));
    const bool digits = text.find_first_of("0123456789") != std::string::npos;
    EXPECT_EQ(digits, filler.may_hold_digits()) << name(kind);
  }
  EXPECT_TRUE(text_filler().may_hold_digits());
}

TEST(Filler, TextIsARing) {
  const auto ids = read(text_filler(), 2, 20, 20);
  for (std::size_t i = 1; i < ids.size(); ++i) EXPECT_EQ(ids[i], (ids[i - 1] + 1) % 7);
}

TEST(Filler, NamesComeBackAndOthersAreRefused) {
  for (const char* known : {"sentences", "shuffled", "words", "digits", "text"})
    EXPECT_EQ(name(*filler_kind(known)), known);
  EXPECT_FALSE(filler_kind("noise").ok());
  EXPECT_FALSE(Filler::make(FillerKind::kText, *tokenizer("bytes")).ok());
  EXPECT_FALSE(Filler::from_text({}).ok());
}

}  // namespace
}  // namespace everlong
