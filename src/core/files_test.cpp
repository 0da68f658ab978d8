#include "core/files.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

namespace everlong {
namespace {

class Files : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "everlong_files_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::size_t entries() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  fs::path folder_;
};

TEST_F(Files, AFileAppearsOnlyWhenCommitted) {
  const fs::path path = folder_ / "weights";
  {
    auto file = AtomicFile::create(path);
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->write("half").ok());
    EXPECT_FALSE(fs::exists(path));
  }
  EXPECT_EQ(entries(), 0U) << "an abandoned temporary was left behind";
  ASSERT_TRUE(write_file(path, "whole").ok());
  EXPECT_EQ(read_file(path).value(), "whole");
}

TEST_F(Files, AnAbandonedWriteLeavesTheOldContents) {
  const fs::path path = folder_ / "weights";
  ASSERT_TRUE(write_file(path, "old").ok());
  {
    auto file = AtomicFile::create(path);
    ASSERT_TRUE(file->write("new, but never committed").ok());
  }
  EXPECT_EQ(read_file(path).value(), "old");
}

TEST_F(Files, WritingOverKeepsTheLengthAndTheEnd) {
  const fs::path path = folder_ / "weights";
  auto file = AtomicFile::create(path);
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->write("head ....").ok());
  ASSERT_TRUE(file->write_over(5, "data").ok());
  ASSERT_TRUE(file->write(" end").ok());
  ASSERT_TRUE(file->commit().ok());
  EXPECT_EQ(read_file(path).value(), "head data end");
}

TEST_F(Files, AFolderThatIsNotThereIsNamed) {
  const auto missing = AtomicFile::create(folder_ / "no" / "such" / "folder");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  EXPECT_NE(missing.status().message().find("no/such/folder"), std::string::npos);
}

TEST_F(Files, AFileTooLargeForItsLimitIsAnErrorAndLeavesTheOldContents) {
  const fs::path path = folder_ / "weights";
  ASSERT_TRUE(write_file(path, "old").ok());
  // A file-size limit stands in for a full disk: write() fails after the file was opened.
  ::signal(SIGXFSZ, SIG_IGN);
  ::rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const ::rlimit tight{1024, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  const Status status = write_file(path, std::string(4096, 'x'));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(status.code(), StatusCode::kIo);
  EXPECT_EQ(read_file(path).value(), "old");
  EXPECT_EQ(entries(), 1U) << "the temporary was left behind";
}

TEST_F(Files, ReadingRefusesWhatIsNoFileOrTooLarge) {
  EXPECT_EQ(read_file(folder_ / "absent").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(read_file(folder_).status().code(), StatusCode::kIo);
  ASSERT_TRUE(write_file(folder_ / "big", std::string(100, 'x')).ok());
  EXPECT_EQ(read_file(folder_ / "big", 99).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(write_file(folder_ / "empty", "").ok());
  EXPECT_EQ(read_file(folder_ / "empty").value(), "");
}

TEST_F(Files, AMapOutlivesItsMove) {
  ASSERT_TRUE(write_file(folder_ / "a", "abc").ok());
  auto first = MappedFile::open(folder_ / "a");
  ASSERT_TRUE(first.ok());
  const MappedFile second = std::move(first).value();
  ASSERT_EQ(second.bytes().size(), 3U);
  EXPECT_EQ(static_cast<char>(second.bytes()[2]), 'c');
}

// Bytes of mapped files that the process holds.
std::int64_t resident_file_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word)
    if (word == "RssFile:") {
      std::int64_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes << 10;
    }
  return -1;
}

// Read in order and let go of piece by piece, a long file takes no memory; and it can be read
// again.
TEST_F(Files, AFileReadInOrderLeavesNothingBehind) {
  constexpr std::size_t kSize = std::size_t{64} << 20, kPiece = 20000;
  auto file = AtomicFile::create(folder_ / "long");  // in short writes, as text arrives
  for (std::size_t written = 0; written < kSize; written += 8192)
    ASSERT_TRUE(file->write(std::string(8192, 'x')).ok());
  ASSERT_TRUE(file->commit().ok());
  const auto map = MappedFile::open(folder_ / "long");
  ASSERT_TRUE(map.ok());
  const std::int64_t before = resident_file_bytes();
  ASSERT_GT(before, 0);
  std::size_t seen = 0;
  for (std::size_t at = 0; at < kSize; at += kPiece) {
    const auto piece = map->bytes().subspan(at, std::min(kPiece, kSize - at));
    seen += static_cast<std::size_t>(std::ranges::count(piece, std::byte{'x'}));
    map->release(piece);
  }
  EXPECT_EQ(seen, kSize);
  EXPECT_LT(resident_file_bytes() - before, 4 << 20);
  EXPECT_EQ(map->bytes()[0], std::byte{'x'});
}

}  // namespace
}  // namespace everlong
