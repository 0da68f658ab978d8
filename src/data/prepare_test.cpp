#include "data/prepare.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <set>

#include "data/tokenizer.h"

namespace everlong {
namespace {

class Prepare : public testing::Test {
 protected:
  Prepare() { fs::create_directories(text_); }
  ~Prepare() override { fs::remove_all(folder_); }

  void put(const std::string& name, std::string_view text) {
    std::ofstream(text_ / name, std::ios::binary) << text;
  }
  void put_many(int count) {
    for (int i = 0; i < count; ++i) put(cat("file", i, ".txt"), cat("text number ", i, "\n"));
  }
  PrepareReport run(const PrepareOptions& options = {}) {
    auto report = prepare({text_}, out_, options);
    EXPECT_TRUE(report.ok()) << report.status().message();
    return report.ok() ? *report : PrepareReport{};
  }
  // The documents of one split as text.
  std::vector<std::string> documents(const std::string& split_name) {
    const auto dataset = TokenDataset::open(out_);
    EXPECT_TRUE(dataset.ok()) << dataset.status().message();
    EXPECT_TRUE(dataset->verify().ok());
    const auto split = *dataset->split(split_name);
    const auto tokenizer = std::move(make_tokenizer("bytes")).value();
    std::vector<std::string> texts;
    for (std::int64_t i = 0; i < split.documents(); ++i) {
      std::vector<std::int32_t> ids(split.document_start(i + 1) - split.document_start(i));
      EXPECT_TRUE(split.read(split.document_start(i), ids).ok());
      EXPECT_EQ(ids.back(), 256);
      texts.push_back(tokenizer->decode(ids));
    }
    return texts;
  }
  std::set<std::string> set_of(const std::string& split_name) {
    const auto texts = documents(split_name);
    return {texts.begin(), texts.end()};
  }
  std::vector<std::string> files_in(const fs::path& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder))
      names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-prepare-", ::getpid());
  const fs::path text_ = folder_ / "text", out_ = folder_ / "out";
};

TEST_F(Prepare, EveryFileBecomesOneDocumentInOneSplit) {
  put_many(50);
  put("bytes.txt", "caf\xc3\xa9\n");
  const PrepareReport report = run({.valid_fraction = 0.3});
  EXPECT_EQ(report.files, 51);
  EXPECT_EQ(report.documents, 51);
  auto all = documents("train");
  const auto valid = documents("valid");
  EXPECT_GT(valid.size(), 5u);
  EXPECT_GT(all.size(), 20u);
  all.insert(all.end(), valid.begin(), valid.end());
  EXPECT_EQ(all.size(), 51u);
  std::multiset<std::string> expected = {"caf\xc3\xa9\n"}, got(all.begin(), all.end());
  for (int i = 0; i < 50; ++i) expected.insert(cat("text number ", i, "\n"));
  EXPECT_EQ(got, expected);
  const auto& splits = report.dataset.splits;
  EXPECT_EQ(splits.at("train").bytes + splits.at("valid").bytes, report.bytes);
  EXPECT_EQ(splits.at("train").tokens, splits.at("train").bytes + splits.at("train").documents);
}

// Seven bytes and the end of the document, in blocks of three positions and a landmark.
TEST_F(Prepare, LandmarksCloseBlocksAndAreOrAreNotPredicted) {
  put("one.txt", "abcdefg");
  using Ids = std::vector<std::int32_t>;
  constexpr std::int32_t kMark = 259, kEnd = 256;
  const Ids marked = {'a', 'b', 'c', kMark, 'd', 'e', 'f', kMark, 'g', kEnd};
  const auto ids_of = [&](const SplitView& split) {
    Ids ids(static_cast<std::size_t>(split.tokens()));
    EXPECT_TRUE(split.read(0, ids).ok());
    return ids;
  };
  run({.valid_fraction = 0, .landmark_block = 4});
  {
    const auto dataset = *TokenDataset::open(out_);
    EXPECT_TRUE(dataset.verify().ok());
    EXPECT_EQ(dataset.info().vocab_size, 260);
    const auto split = *dataset.split("train");
    EXPECT_EQ(ids_of(split), marked);
    Ids targets(marked.size());
    std::vector<float> weights(marked.size());
    ASSERT_TRUE(split.has_targets() && split.read_targets(0, targets, weights).ok());
    EXPECT_EQ(targets, (Ids{'b', 'c', 'd', kNoTarget, 'e', 'f', 'g', kNoTarget, kEnd, kNoTarget}));
    EXPECT_EQ(weights, (std::vector<float>{1, 1, 1, 0, 1, 1, 1, 0, 1, 0}));
  }
  run({.valid_fraction = 0, .landmark_block = 4, .landmark_predicted = true});
  const auto dataset = *TokenDataset::open(out_);
  const auto split = *dataset.split("train");
  EXPECT_EQ(ids_of(split), marked);
  EXPECT_FALSE(split.has_targets());
  // A block that the end of the document fills has no landmark behind it.
  run({.valid_fraction = 0, .landmark_block = 9, .landmark_predicted = true});
  EXPECT_EQ(ids_of(*TokenDataset::open(out_)->split("train")).size(), 8u);
  for (const PrepareOptions& bad :
       {PrepareOptions{.landmark_block = 1}, PrepareOptions{.landmark_predicted = true}})
    EXPECT_EQ(prepare({text_}, out_, bad).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(Prepare, SplitDependsOnTheTextAloneNotOnNamesOrNeighbours) {
  put_many(60);
  run({.valid_fraction = 0.3});
  const auto train = set_of("train"), valid = set_of("valid");
  fs::remove_all(text_);
  fs::create_directories(text_);
  for (int i = 0; i < 100; ++i) put(cat("other", 1000 - i, ".md"), cat("text number ", i, "\n"));
  run({.valid_fraction = 0.3});
  const auto train2 = set_of("train"), valid2 = set_of("valid");
  EXPECT_TRUE(std::includes(train2.begin(), train2.end(), train.begin(), train.end()));
  EXPECT_TRUE(std::includes(valid2.begin(), valid2.end(), valid.begin(), valid.end()));
}

TEST_F(Prepare, SameTextGivesTheSameBytes) {
  put_many(20);
  run();
  const auto first = *read_file(out_ / "train-00000.tokens"),
             info = *read_file(out_ / kDatasetFile);
  run();
  EXPECT_EQ(*read_file(out_ / "train-00000.tokens"), first);
  EXPECT_EQ(*read_file(out_ / kDatasetFile), info);
}

TEST_F(Prepare, NoSplitIsEmptyFromTwoDocumentsOn) {
  for (int base = 0; base < 20; ++base) {
    fs::remove_all(text_);
    fs::create_directories(text_);
    put("a.txt", cat("first ", base));
    put("b.txt", cat("second ", base));
    for (const double fraction : {1e-6, 0.999999}) {
      run({.valid_fraction = fraction});
      EXPECT_EQ(documents("train").size(), 1u);
      EXPECT_EQ(documents("valid").size(), 1u);
    }
  }
  run({.valid_fraction = 0});
  EXPECT_EQ(documents("train").size(), 2u);
  fs::remove(text_ / "a.txt");
  run({.valid_fraction = 0.9});
  EXPECT_EQ(documents("train").size(), 1u);
}

TEST_F(Prepare, DuplicatesCountOnce) {
  put_many(10);
  put("again.txt", "text number 3\n");
  put("and-again.txt", "text number 3\n");
  const PrepareReport report = run();
  EXPECT_EQ(report.files, 12);
  EXPECT_EQ(report.duplicates, 2);
  EXPECT_EQ(report.documents, 10);
}

TEST_F(Prepare, LargeFilesAreManyDocumentsOverManyShards) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += cat("paragraph ", i, "\nof two lines\n\n");
  put("large.txt", text);
  const PrepareReport report =
      run({.valid_fraction = 0.2, .max_document_bytes = 500, .shard_tokens = 3000});
  EXPECT_GT(report.documents, 50);
  EXPECT_GT(report.dataset.splits.at("train").shards.size(), 5u);
  for (const auto& document : documents("train")) {
    EXPECT_LE(document.size(), 500u);
    EXPECT_TRUE(document.starts_with("paragraph ")) << document;
  }
  EXPECT_EQ(report.bytes, static_cast<std::int64_t>(text.size()));
}

TEST_F(Prepare, ReplacesADatasetWholly) {
  put_many(200);
  run({.shard_tokens = 200});
  EXPECT_GT(files_in(out_).size(), 10u);
  fs::remove_all(text_);
  fs::create_directories(text_);
  put_many(3);
  run();
  EXPECT_EQ(files_in(out_),
            (std::vector<std::string>{"dataset.json", "train-00000.tokens", "valid-00000.tokens"}));
}

TEST_F(Prepare, FolderWithOtherThingsIsRefusedAndWithForceKept) {
  put_many(5);
  fs::create_directories(out_);
  std::ofstream(out_ / "letter.doc") << "mine";
  const auto refused = prepare({text_}, out_, {});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("letter.doc"), std::string::npos);
  EXPECT_EQ(files_in(out_), std::vector<std::string>{"letter.doc"});
  run({.force = true});
  EXPECT_EQ(*read_file(out_ / "letter.doc"), "mine");
  EXPECT_EQ(documents("train").size() + documents("valid").size(), 5u);
}

TEST_F(Prepare, FailureLeavesTheOldDatasetAndNothingElse) {
  put_many(5);
  run();
  const auto before = files_in(out_);
  const auto info = *read_file(out_ / kDatasetFile);
  EXPECT_FALSE(prepare({text_ / "nothing"}, out_, {}).ok());
  EXPECT_FALSE(prepare({text_}, out_, {.valid_fraction = 1}).ok());
  EXPECT_FALSE(prepare({text_}, out_, {.tokenizer = "letters"}).ok());
  EXPECT_EQ(files_in(out_), before);
  EXPECT_EQ(*read_file(out_ / kDatasetFile), info);
  EXPECT_FALSE(prepare({text_ / "nothing"}, folder_ / "new", {}).ok());
  EXPECT_FALSE(fs::exists(folder_ / "new"));
}

TEST_F(Prepare, FailureWhileMovingIntoPlaceLeavesNoHalfDataset) {
  put_many(5);
  run({.valid_fraction = 0});
  put("more.txt", "more");
  fs::create_directories(out_ / "valid-00000.tokens" / "in the way");
  EXPECT_FALSE(prepare({text_}, out_, {.valid_fraction = 0.5, .force = true}).ok());
  // The old dataset.json would name shards of the new one by now.
  EXPECT_FALSE(fs::exists(out_ / kDatasetFile));
  for (const auto& name : files_in(out_)) EXPECT_FALSE(name.starts_with('.')) << name;
}

TEST_F(Prepare, FullDiskLeavesTheOldDatasetOrNoFolderAtAll) {
  put_many(5);
  run();
  put("large.txt", std::string(100000, 'x'));
  const auto before = documents("train");
  ::rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  ::rlimit small = old;
  small.rlim_cur = 50000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto replacing = prepare({text_}, out_, {});
  const auto fresh = prepare({text_}, folder_ / "new", {});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(replacing.status().code(), StatusCode::kIo);
  EXPECT_EQ(fresh.status().code(), StatusCode::kIo);
  EXPECT_EQ(documents("train"), before);
  EXPECT_FALSE(fs::exists(folder_ / "new"));
}

TEST_F(Prepare, LeftoversOfAKilledRunAreRemoved) {
  put_many(5);
  const fs::path leftover = out_ / ".prepare.part.999999999";
  fs::create_directories(leftover);
  std::ofstream(leftover / "train-00000.tokens") << "half";
  run();
  EXPECT_EQ(files_in(out_),
            (std::vector<std::string>{"dataset.json", "train-00000.tokens", "valid-00000.tokens"}));
}

TEST_F(Prepare, NoTextSaysWhatWasLeftOut) {
  put("a.png", "x");
  put("b.txt", std::string("\0", 1));
  const auto result = prepare({text_}, out_, {});
  ASSERT_FALSE(result.ok());
  EXPECT_NE(result.status().message().find(
                "no text found (left out: 1 not UTF-8 text, 1 other ending); --all-files"),
            std::string::npos)
      << result.status().message();
  EXPECT_FALSE(fs::exists(out_));
}

TEST_F(Prepare, OutputInsideTheTextIsNotRead) {
  put_many(5);
  const fs::path inside = text_ / "data";
  ASSERT_TRUE(prepare({text_}, inside, {.all_files = true}).ok());
  const auto again = prepare({text_}, inside, {.all_files = true});
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->files, 5);
}

}  // namespace
}  // namespace everlong
