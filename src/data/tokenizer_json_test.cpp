#include "data/tokenizer_json.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

namespace everlong {
namespace {

using nlohmann::json;

const fs::path kFolder = fs::path(EVERLONG_TEST_DATA) / "golden/tokenizers";

std::string contents(const fs::path& path) { return *read_file(path); }

std::unique_ptr<Tokenizer> tokenizer(const std::string& name) {
  auto read = read_tokenizer_json(kFolder / (name + ".json"));
  EXPECT_TRUE(read.ok()) << read.status().message();
  return read.ok() ? std::move(read).value() : nullptr;
}

// A file that differs from gpt2.json in one place.
Result<std::unique_ptr<Tokenizer>> changed(const std::function<void(json&)>& change,
                                           const std::string& config = {}) {
  json file = json::parse(contents(kFolder / "gpt2.json"));
  change(file);
  const fs::path folder = fs::temp_directory_path() / cat("tokenizer_json_test.", getpid());
  fs::create_directories(folder);
  EXPECT_TRUE(write_file(folder / "tokenizer.json", file.dump()).ok());
  if (!config.empty()) {
    EXPECT_TRUE(write_file(folder / "tokenizer_config.json", config).ok());
  }
  auto read = read_tokenizer_json(folder);
  fs::remove_all(folder);
  return read;
}

class PublishedPatterns : public testing::TestWithParam<const char*> {};

TEST_P(PublishedPatterns, GiveTheIdsOfTheTokenizersPackage) {
  const auto ours = tokenizer(GetParam());
  ASSERT_NE(ours, nullptr);
  std::istringstream wanted_text(contents(kFolder / cat(GetParam(), ".ids")));
  std::vector<std::int32_t> wanted;
  for (std::int32_t id; wanted_text >> id;) wanted.push_back(id);
  ASSERT_GT(wanted.size(), 1000u);
  EXPECT_EQ(ours->encode(contents(kFolder / "text")), wanted);
}

TEST_P(PublishedPatterns, ComeBackFromAnyBytes) {
  const auto ours = tokenizer(GetParam());
  ASSERT_NE(ours, nullptr);
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    const std::size_t size = random() % 200;
    while (text.size() < size)
      text += random() % 3 == 0 ? std::string(random() % 60, 'a')
                                : all.substr(random() % 256, 1 + random() % 4);
    EXPECT_EQ(ours->decode(ours->encode(text)), text) << "round " << round;
  }
}

TEST_P(PublishedPatterns, ReadAPieceAsLongAsABookInTime) {  // n squared would take hours
  const auto ours = tokenizer(GetParam());
  ASSERT_NE(ours, nullptr);
  std::string text;
  for (unsigned i = 0; i < 1'000'000; ++i) text += static_cast<char>('a' + i * 31 % 26);
  EXPECT_TRUE(ours->decode(ours->encode(text)) == text);  // EXPECT_EQ would print a megabyte
}

INSTANTIATE_TEST_SUITE_P(TokenizerJson, PublishedPatterns,
                         testing::Values("gpt2", "llama3", "cl100k"),
                         [](const auto& pattern) { return std::string(pattern.param); });

TEST(TokenizerJson, SpecialTokensInATextArePlainText) {
  const auto ours = tokenizer("gpt2");
  const auto ids = ours->encode("a<|endoftext|>b");
  EXPECT_EQ(std::ranges::count(ids, ours->eod()), 0);
  EXPECT_EQ(ours->decode(ids), "a<|endoftext|>b");
  EXPECT_EQ(ours->decode(std::vector<std::int32_t>{ours->eod()}), "");
}

TEST(TokenizerJson, AddedTokensTakeTheSpaceThatTheyAskFor) {
  const auto ours = tokenizer("gpt2");
  EXPECT_EQ(ours->decode(ours->encode("so \t<think>\u3000\n yes")), "so<think>yes");
  EXPECT_EQ(ours->decode(ours->encode("so <thinking> yes")),
            "so <thinking> yes");  // the longer one
}

TEST(TokenizerJson, RolesComeFromTheConfigElseFromTheUsualNames) {
  const auto plain = tokenizer("llama3");
  EXPECT_EQ(plain->bod(), 0);
  EXPECT_EQ(plain->eod(), 1);
  const auto told =
      changed([](json&) {}, R"({"eos_token": {"content": "<thinking>"}, "pad_token": "<think>"})");
  ASSERT_TRUE(told.ok()) << told.status().message();
  EXPECT_EQ((*told)->decode(std::vector{(*told)->eod()}), "<thinking>");
  EXPECT_NE((*told)->pad(), (*told)->eod());
}

TEST(TokenizerJson, NameTellsFilesApart) {
  EXPECT_EQ(tokenizer("gpt2")->name(), tokenizer("gpt2")->name());
  EXPECT_NE(tokenizer("gpt2")->name(), tokenizer("cl100k")->name());
}

TEST(TokenizerJson, WhatWouldChangeIdsIsRefusedByName) {
  const std::pair<const char*, std::function<void(json&)>> cases[] = {
      {"NFC",
       [](json& f) {
         f["normalizer"] = {{"type", "NFC"}};
       }},
      {"ByteLevel", [](json& f) { f["pre_tokenizer"] = nullptr; }},
      {"Metaspace",
       [](json& f) {
         f["pre_tokenizer"] = {{"type", "Metaspace"}};
       }},
      {"use_regx", [](json& f) { f["pre_tokenizer"]["use_regx"] = false; }},
      {"BPE", [](json& f) { f["model"]["type"] = "Unigram"; }},
      {"byte_fallback", [](json& f) { f["model"]["byte_fallback"] = true; }},
      {"dropout", [](json& f) { f["model"]["dropout"] = 0.1; }},
      {"does not join", [](json& f) { f["model"]["merges"].push_back("a"); }},
      {"does not join",
       [](json& f) {
         f["model"]["merges"].push_back({"q", "zzzz"});
       }},
      {"is no token", [](json& f) { f["model"]["vocab"].erase("Ā"); }},
      {"has id", [](json& f) { f["model"]["vocab"]["A"] = -1; }},
      {"has id", [](json& f) { f["model"]["vocab"]["A"] = 1ll << 40; }},
      {"two tokens", [](json& f) { f["model"]["vocab"]["Ā"] = f["model"]["vocab"]["ā"]; }},
      {"single_word", [](json& f) { f["added_tokens"][1]["single_word"] = true; }},
      {"id and content", [](json& f) { f["added_tokens"][1].erase("id"); }},
      {"regular expression",
       [](json& f) {
         f["pre_tokenizer"] = {{"type", "Split"},
                               {"pattern", {{"Regex", "(a"}}},
                               {"behavior", "Isolated"},
                               {"invert", false}};
       }},
  };
  for (const auto& [reason, change] : cases) {
    const auto read = changed(change);
    ASSERT_FALSE(read.ok()) << reason;
    EXPECT_NE(read.status().message().find(reason), std::string::npos) << read.status().message();
  }
}

TEST(TokenizerJson, DamagedFilesAreRefused) {
  const std::string whole = contents(kFolder / "gpt2.json");
  const fs::path file = fs::temp_directory_path() / cat("tokenizer_json_test.", getpid(), ".json");
  for (std::size_t size = 0; size + 1 < whole.size(); size += 997) {
    ASSERT_TRUE(write_file(file, whole.substr(0, size)).ok());
    EXPECT_FALSE(read_tokenizer_json(file).ok()) << size;
  }
  fs::remove(file);
  EXPECT_FALSE(read_tokenizer_json(file).ok());
}

}  // namespace
}  // namespace everlong
