#include "data/sentencepiece.h"

#include <gtest/gtest.h>

#include <random>
#include <sstream>

namespace everlong {
namespace {

const fs::path kModels = fs::path(EVERLONG_TEST_DATA) / "golden/tokenizers";

std::unique_ptr<Tokenizer> sentencepiece(const std::string& name) {
  auto read = read_sentencepiece(kModels / (name + ".model"));
  EXPECT_TRUE(read.ok()) << read.status().message();
  return read.ok() ? std::move(read).value() : nullptr;
}

std::string in_pieces(const Tokenizer& tokenizer, std::span<const std::int32_t> ids) {
  std::string text;
  for (const std::int32_t id : ids) text += tokenizer.decode({&id, 1});
  return text;
}

class SentencePieceModels : public testing::TestWithParam<const char*> {};

// tests/golden/README.md: 14 and 9 KB of ids by the sentencepiece package, of 6 KB of mixed
// scripts.
TEST_P(SentencePieceModels, GiveTheIdsOfTheSentencepiecePackage) {
  const auto ours = sentencepiece(GetParam());
  ASSERT_NE(ours, nullptr);
  std::istringstream wanted_text(*read_file(kModels / cat(GetParam(), ".ids")));
  std::vector<std::int32_t> wanted;
  for (std::int32_t id; wanted_text >> id;) wanted.push_back(id);
  ASSERT_GT(wanted.size(), 1000U);
  EXPECT_EQ(ours->encode(*read_file(kModels / "text")), wanted);
}

TEST_P(SentencePieceModels, DecodeTheSameTextInPieces) {
  const auto ours = sentencepiece(GetParam());
  ASSERT_NE(ours, nullptr);
  const auto ids = ours->encode(*read_file(kModels / "text"));
  EXPECT_EQ(in_pieces(*ours, ids), ours->decode(ids));
}

INSTANTIATE_TEST_SUITE_P(All, SentencePieceModels, testing::Values("llama2", "unigram"));

TEST(SentencePiece, EveryCharacterComesBackThroughBytes) {
  const auto ours = sentencepiece("llama2");
  ASSERT_NE(ours, nullptr);
  std::string text = "naïve\n\t  two  blanks \u4e2d\u6587 \U0001F600 \x7F \u0000end ";
  std::mt19937 random(20261123);
  for (int i = 0; i < 3000; ++i) {  // any characters, most of them in no piece
    const unsigned code = random() % (i % 2 == 0 ? 0x800 : 0x10000);
    // Surrogates are no characters; U+2581 is how the model spells a blank, and becomes one.
    if ((code >= 0xD800 && code < 0xE000) || code == 0x2581) continue;
    if (code < 0x80) {
      text += static_cast<char>(code);
    } else if (code < 0x800) {
      text += {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
    } else {
      text += {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3F)),
               static_cast<char>(0x80 | (code & 0x3F))};
    }
  }
  const auto ids = ours->encode(text);
  EXPECT_EQ(ours->decode(ids), " " + text) << "the blank before a text is kept where none begins";
  EXPECT_EQ(in_pieces(*ours, ids), " " + text);
}

TEST(SentencePiece, ACharacterMayArriveByteByByte) {
  const auto ours = sentencepiece("llama2");
  ASSERT_NE(ours, nullptr);
  const auto ids = ours->encode("\U0001F600");
  ASSERT_GE(ids.size(), 4U);
  const auto bytes = std::span(ids).last(4);
  EXPECT_EQ(ours->decode(bytes.first(1)), "\xF0");
  EXPECT_EQ(ours->decode(bytes.first(3)), "\xF0\x9F\x98");
  EXPECT_EQ(ours->decode(bytes), "\U0001F600");
}

TEST(SentencePiece, TheBlankBeforeATextIsLeftOutWhereATextBegins) {
  const auto ours = sentencepiece("llama2");
  ASSERT_NE(ours, nullptr);
  std::vector<std::int32_t> two = {ours->bod()};
  ours->encode("The stream", two);
  two.push_back(ours->eod());
  ours->encode("The end", two);
  EXPECT_EQ(ours->decode(two), "The streamThe end");
  const auto plain = sentencepiece("unigram");  // puts no blank before a text
  ASSERT_NE(plain, nullptr);
  EXPECT_EQ(plain->decode(plain->encode("stream")), "stream");
  std::vector<std::int32_t> blank = {plain->bod()};
  plain->encode(" stream", blank);
  EXPECT_EQ(plain->decode(blank), " stream") << "this blank is the text's own";
}

TEST(SentencePiece, SpecialIdsAreTheModelsAndNoTextMakesThem) {
  const auto ours = sentencepiece("llama2");
  ASSERT_NE(ours, nullptr);
  EXPECT_EQ(ours->vocab_size(), 600);
  EXPECT_EQ(ours->bod(), 1);
  EXPECT_EQ(ours->eod(), 2);
  EXPECT_EQ(ours->pad(), 2) << "no pad in the model: the end stands in";
  EXPECT_EQ(sentencepiece("unigram")->pad(), 3);
  for (const std::int32_t id : ours->encode("<s>one</s> two<unk>")) EXPECT_GT(id, 2);
  const std::vector<std::int32_t> silent = {1, 2, -5, 600, 1 << 30};
  EXPECT_EQ(ours->decode(silent), "");
}

TEST(SentencePiece, BytesThatAreNoTextAreRepresentedNotRefused) {
  const auto ours = sentencepiece("llama2");
  ASSERT_NE(ours, nullptr);
  EXPECT_EQ(ours->decode(ours->encode("a\xFF\xC3z")), " a\uFFFD\uFFFDz");
}

TEST(SentencePiece, IsFoundByFileByFolderAndByItsRecordedName) {
  const fs::path folder = fs::temp_directory_path() / cat("sentencepiece_test.", ::getpid());
  ASSERT_TRUE(make_directories(folder).ok());
  fs::copy_file(kModels / "llama2.model", folder / "tokenizer.model",
                fs::copy_options::overwrite_existing);
  const auto by_folder = make_tokenizer(folder.string());
  ASSERT_TRUE(by_folder.ok()) << by_folder.status().message();
  const std::string name((*by_folder)->name());
  EXPECT_TRUE(name.starts_with("tokenizer.model ")) << name;
  EXPECT_EQ(name.size(), 32U);
  EXPECT_TRUE(make_tokenizer((folder / "tokenizer.model").string()).ok());
  EXPECT_TRUE(make_tokenizer("published", folder).ok());
  EXPECT_TRUE(make_tokenizer(name, folder).ok());
  const auto other = make_tokenizer("tokenizer.model 0123456789abcdef", folder);
  ASSERT_FALSE(other.ok());
  EXPECT_NE(other.status().message().find("another one"), std::string::npos);

  // As in Llama 2: a tokenizer.json beside it that cannot be read, then one that can.
  ASSERT_TRUE(write_file(folder / "tokenizer.json", R"({"normalizer": {"type": "Prepend"}})").ok());
  const auto beside = make_tokenizer("published", folder);
  ASSERT_TRUE(beside.ok()) << beside.status().message();
  EXPECT_EQ((*beside)->name(), name);
  fs::copy_file(kModels / "gpt2.json", folder / "tokenizer.json",
                fs::copy_options::overwrite_existing);
  EXPECT_TRUE((*make_tokenizer("published", folder))->name().starts_with("tokenizer.json "));

  const fs::path copy = folder / "copy";
  ASSERT_TRUE(copy_tokenizer_files(folder, copy).ok());
  EXPECT_TRUE(make_tokenizer(name, copy).ok());
  fs::remove_all(folder);
}

TEST(SentencePiece, WhatIsNoModelIsRefusedByName) {
  const fs::path path = fs::temp_directory_path() / cat("no_model.", ::getpid(), ".model");
  for (const std::string& text : {std::string(), std::string("no model"), std::string(300, '\xFF'),
                                  read_file(kModels / "llama2.model")->substr(0, 200)}) {
    ASSERT_TRUE(write_file(path, text).ok());
    const auto read = read_sentencepiece(path);
    ASSERT_FALSE(read.ok()) << text.size();
    EXPECT_NE(read.status().message().find(path.string()), std::string::npos);
  }
  fs::remove(path);
  EXPECT_EQ(read_sentencepiece(path).status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace everlong
