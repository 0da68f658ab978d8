// Tokenizers as users meet them: a folder with a SentencePiece model beside LibTorch, and the
// messages of `data train-tokenizer`. Training itself is in the interop test of tokenizers.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/process.h"
#include "data/sentencepiece.h"
#include "support/published_folders.h"

namespace everlong::test {
namespace {

const fs::path kTokenizers = fs::path(EVERLONG_TEST_DATA) / "golden/tokenizers";

ProcessResult everlong(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), EVERLONG_BINARY);
  auto ran = run_process({.command = std::move(arguments)});
  EXPECT_TRUE(ran.ok()) << ran.status().message();
  return ran.ok() ? *ran : ProcessResult{.exit_code = -1, .output = {}, .errors = {}};
}

// Llama 2's files in small: its config, weights, tokenizer.model.
class SentencePieceFolder : public testing::Test {
 protected:
  SentencePieceFolder() : folder_("tokenizer_cli") {
    auto config = published_configs()[0];
    config["vocab_size"] = 600;
    publish(made(folder_, "llama"), config);
    fs::copy_file(kTokenizers / "llama2.model", folder_ / "llama/tokenizer.model");
    text_ = "The streams, na\u00EFve \U0001F600\n\n  end.";
    EXPECT_TRUE(write_file(folder_ / "text.txt", text_).ok());
  }
  std::string path(const char* name) const { return (folder_ / name).string(); }

  TemporaryFolder folder_;
  std::string text_;
};

TEST_F(SentencePieceFolder, TextGoesInAndComesBack) {
  const auto ids = everlong({"data", "tokenize", "-t", path("llama"), path("text.txt")});
  ASSERT_EQ(ids.exit_code, 0) << ids.errors;
  ASSERT_TRUE(write_file(folder_ / "ids", ids.output).ok());
  const auto text = everlong({"data", "tokenize", "-t", path("llama"), "--decode", path("ids")});
  ASSERT_EQ(text.exit_code, 0) << text.errors;
  EXPECT_EQ(text.output, text_);
}

TEST_F(SentencePieceFolder, GeneratesTheSameAfterConversion) {
  const auto generate = [&](const char* model) {
    return everlong({"generate", "--model", path(model), "--prompt", "The stream", "--max-tokens",
                     "12", "--temperature", "0"});
  };
  const auto before = generate("llama");
  ASSERT_EQ(before.exit_code, 0) << before.errors;
  EXPECT_FALSE(before.output.empty());
  const auto converted = everlong({"convert", path("llama"), path("ours")});
  ASSERT_EQ(converted.exit_code, 0) << converted.errors;
  EXPECT_EQ(*read_file(folder_ / "ours/tokenizer.model"), *read_file(kTokenizers / "llama2.model"));
  const auto after = generate("ours");
  ASSERT_EQ(after.exit_code, 0) << after.errors;
  EXPECT_EQ(after.output, before.output);
}

// A file is read in pieces of 64 KiB; words lie across their ends.
TEST_F(SentencePieceFolder, APromptFileGivesTheTokensOfItsWholeText) {
  std::string text;
  for (int i = 0; text.size() < (std::size_t{1} << 17) + 1000; ++i) text += cat("stream", i, " ");
  ASSERT_TRUE(write_file(folder_ / "long.txt", text).ok());
  const auto ids = everlong({"data", "tokenize", "-t", path("llama"), path("long.txt")});
  ASSERT_EQ(ids.exit_code, 0) << ids.errors;
  const auto read = everlong({"generate", "--model", path("llama"), "--prompt-file",
                              path("long.txt"), "--max-tokens", "0", "--json"});
  ASSERT_EQ(read.exit_code, 0) << read.errors;
  const auto report = nlohmann::json::parse(read.output);
  std::istringstream words(ids.output);
  const auto count = std::distance(std::istream_iterator<std::int64_t>(words), {});
  EXPECT_EQ(report.at("prompt_tokens"), count);
}

TEST_F(SentencePieceFolder, ADatasetCarriesTheModelAndRecordsItsHash) {
  fs::create_directories(folder_ / "texts");
  for (int i = 0; i < 8; ++i)
    ASSERT_TRUE(
        write_file(folder_ / "texts" / cat(i, ".txt"), cat("stream ", i * 7919, "\n")).ok());
  const auto prepared = everlong({"data", "prepare", path("texts"), "--out", path("tokens"),
                                  "--tokenizer", path("llama"), "--valid-fraction", "0.2"});
  ASSERT_EQ(prepared.exit_code, 0) << prepared.errors;
  EXPECT_EQ(*read_file(folder_ / "tokens/tokenizer.model"),
            *read_file(kTokenizers / "llama2.model"));
  const auto info = everlong({"data", "info", path("tokens"), "--verify"});
  ASSERT_EQ(info.exit_code, 0) << info.errors;
  EXPECT_NE(info.output.find("tokenizer.model "), std::string::npos) << info.output;
}

// Both libraries export FLAGS_minloglevel, of different types, and a protobuf: neither may take the
// other's.
TEST(SentencePieceBesideTorch, LeavesTheSymbolsOfTorchAlone) {
  const at::Tensor before = at::arange(12, at::kFloat).view({3, 4}).mm(at::ones({4, 2}));
  const auto* const flag = static_cast<const int*>(::dlsym(RTLD_DEFAULT, "FLAGS_minloglevel"));
  ASSERT_NE(flag, nullptr) << "LibTorch has no such variable any more: this test proves nothing";
  const int level = *flag;
  const auto tokenizer = read_sentencepiece(kTokenizers / "llama2.model");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(*flag, level);
  // What is found by name for all is LibTorch's still, so the library came in beside, not before.
  EXPECT_EQ(::dlsym(RTLD_DEFAULT, "FLAGS_minloglevel"), flag);
  EXPECT_EQ(::dlsym(RTLD_DEFAULT, "_ZN13sentencepiece22SentencePieceProcessorC1Ev"), nullptr)
      << "sentencepiece is linked, or opened for all: its protobuf would meet LibTorch's";
  EXPECT_TRUE(at::equal(at::arange(12, at::kFloat).view({3, 4}).mm(at::ones({4, 2})), before));
}

TEST(TrainTokenizer, SaysHowToInstallThePackage) {
  const TemporaryFolder folder("train_tokenizer");
  ASSERT_TRUE(write_file(folder / "text.txt", "a stream of words\n").ok());
  // -S: no packages but Python's own library.
  ASSERT_TRUE(write_file(folder / "bare", "#!/bin/sh\nexec python3 -S -E \"$@\"\n").ok());
  fs::permissions(folder / "bare", fs::perms::owner_all);
  const auto run = [&](const std::string& python, const std::string& size) {
    return everlong({"data", "train-tokenizer", (folder / "text.txt").string(), "--out",
                     (folder / "tokenizer.json").string(), "--vocab-size", size, "--python",
                     python});
  };
  const auto bare = run((folder / "bare").string(), "300");
  EXPECT_NE(bare.exit_code, 0);
  EXPECT_NE(bare.errors.find("-m pip install tokenizers=="), std::string::npos) << bare.errors;
  const auto none = run("no-such-python", "300");
  EXPECT_NE(none.exit_code, 0);
  EXPECT_NE(none.errors.find("--python PROGRAM"), std::string::npos) << none.errors;
  const auto small = run("python3", "12");
  EXPECT_NE(small.exit_code, 0);
  EXPECT_NE(small.errors.find("from 257"), std::string::npos) << small.errors;
  EXPECT_FALSE(fs::exists(folder / "tokenizer.json"));
}

}  // namespace
}  // namespace everlong::test
