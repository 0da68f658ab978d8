#include "data/documents.h"

#include <gtest/gtest.h>
#include <unistd.h>

namespace everlong {
namespace {

class Documents : public testing::Test {
 protected:
  Documents() { fs::create_directories(folder_); }
  ~Documents() override { fs::remove_all(folder_); }

  fs::path put(const std::string& name, std::string_view text) {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  // The documents of a text; their offsets are checked to be without gaps.
  std::vector<std::string> cut(const std::string& text, std::int64_t max_bytes) {
    auto reader = DocumentReader::open(put("cut.txt", text), max_bytes);
    EXPECT_TRUE(reader.ok());
    std::vector<std::string> documents;
    std::int64_t expected = 0, offset = -1;
    for (std::string document; *reader->next(document, offset);
         expected += static_cast<std::int64_t>(document.size())) {
      EXPECT_EQ(offset, expected);
      EXPECT_EQ(*read_part(folder_ / "cut.txt", offset, static_cast<std::int64_t>(document.size())),
                document);
      documents.push_back(document);
    }
    EXPECT_EQ(join(documents, ""), text);
    return documents;
  }
  std::vector<std::string> found(const WalkOptions& options, SkipCounts& skipped) {
    const auto files = find_text_files({folder_}, options, skipped);
    EXPECT_TRUE(files.ok()) << files.status().message();
    std::vector<std::string> names;
    for (const auto& file : *files) names.push_back(file.path.lexically_relative(folder_).string());
    return names;
  }

  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-documents-", ::getpid());
};

TEST_F(Documents, TextIsValidUtf8WithoutNul) {
  for (const char* good : {"", "plain\r\n\t\x7f", "caf\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80",
                           "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"})
    EXPECT_TRUE(looks_like_text(good, true)) << good;
  // Continuation alone, overlong (2, 3, 4 bytes), surrogate, beyond U+10FFFF, no continuation,
  // Latin-1, never legal.
  for (const char* bad : {"\x80", "\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xed\xa0\x80",
                          "\xf4\x90\x80\x80", "\xc3(", "caf\xe9 ", "\xff", "\xf8\x88\x80\x80\x80"})
    EXPECT_FALSE(looks_like_text(bad, false)) << bad;
  EXPECT_FALSE(looks_like_text(std::string_view("a\0b", 3), true));
  EXPECT_TRUE(looks_like_text("x\xf0\x9f\x98", false));
  EXPECT_FALSE(looks_like_text("x\xf0\x9f\x98", true));
}

TEST_F(Documents, SmallFileIsOneDocument) {
  EXPECT_EQ(cut("one\n\ntwo\n", 64), std::vector<std::string>{"one\n\ntwo\n"});
  const std::string exact(64, 'x');
  EXPECT_EQ(cut(exact, 64), std::vector<std::string>{exact});
  EXPECT_TRUE(cut("", 64).empty());
}

TEST_F(Documents, LargeFileIsCutAtItsLastBlankLine) {
  EXPECT_EQ(cut("aaaa\nb\n\ncc\n\nd\ne\n", 12),
            (std::vector<std::string>{"aaaa\nb\n\ncc\n\n", "d\ne\n"}));
  EXPECT_EQ(cut("aaaa\nb\n\ncc\n\nd\ne\n", 11),
            (std::vector<std::string>{"aaaa\nb\n\n", "cc\n\nd\ne\n"}));
}

TEST_F(Documents, WithoutBlankLinesItIsCutAtALineAndWithoutLinesBetweenCharacters) {
  EXPECT_EQ(cut("aaa\nbbb\nccc\nddd\n", 10),
            (std::vector<std::string>{"aaa\nbbb\n", "ccc\nddd\n"}));
  std::string euros;
  for (int i = 0; i < 20; ++i) euros += "\xe2\x82\xac";
  for (std::int64_t most = 4; most < 20; ++most)
    for (const auto& document : cut(euros, most)) {
      EXPECT_TRUE(looks_like_text(document, true)) << most;
      EXPECT_LE(static_cast<std::int64_t>(document.size()), most);
    }
  EXPECT_EQ(cut("0123456789", 4), (std::vector<std::string>{"0123", "4567", "89"}));
}

TEST_F(Documents, BlankLinesOnlyAtTheBeginningMakeNoCrumbs) {
  EXPECT_EQ(cut("a\n\n" + std::string(60, 'x'), 32).size(), 2u);
}

TEST_F(Documents, FilesComeByNameAndWithReasonsForTheRest) {
  put("b.txt", "b");
  put("a/z.rst", "z");
  put("a/README", "readme");
  put("a.md", "a");
  put("UPPER.TXT", "u");
  put("picture.png", "text in disguise");
  put("binary.txt", std::string("\0\1", 2));
  put("program",
      "\x7f"
      "ELF\xff\xfe");
  put("blank.txt", " \n\n");
  put(".hidden.txt", "h");
  put(".git/config.txt", "h");
  put("SOURCE.txt", "everlong-corpus-1\npackage x\n");
  put("other/SOURCE.txt", "a text of that name");
  fs::create_symlink(folder_ / "b.txt", folder_ / "link.txt");
  fs::create_directory_symlink(folder_ / "a", folder_ / "loop");
  SkipCounts skipped;
  EXPECT_EQ(found({}, skipped), (std::vector<std::string>{"UPPER.TXT", "a/README", "a/z.rst",
                                                          "a.md", "b.txt", "other/SOURCE.txt"}));
  EXPECT_EQ(skipped, (SkipCounts{{"hidden", 2},
                                 {"symbolic link", 2},
                                 {"other ending", 1},
                                 {"not UTF-8 text", 2},
                                 {"empty", 1},
                                 {"note about a fetched corpus", 1}}));
  SkipCounts all;
  EXPECT_EQ(
      found({.all_files = true, .leave_out = folder_ / "a"}, all),
      (std::vector<std::string>{"UPPER.TXT", "a.md", "b.txt", "other/SOURCE.txt", "picture.png"}));
}

TEST_F(Documents, NamedFileIsTakenWhateverItsEnding) {
  put(".x.log", "log");
  SkipCounts skipped;
  const auto files = find_text_files({folder_ / ".x.log"}, {}, skipped);
  ASSERT_TRUE(files.ok());
  EXPECT_EQ(files->size(), 1u);
}

TEST_F(Documents, MissingPathIsNamed) {
  SkipCounts skipped;
  const auto files = find_text_files({folder_, folder_ / "nothing"}, {}, skipped);
  ASSERT_FALSE(files.ok());
  EXPECT_NE(files.status().message().find("nothing: no such file or folder"), std::string::npos);
}

}  // namespace
}  // namespace everlong
