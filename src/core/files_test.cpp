#include "core/files.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>

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

}  // namespace
}  // namespace everlong
