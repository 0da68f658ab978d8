#include "core/folder_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "core/text.h"

namespace everlong {
namespace {

TEST(FolderLock, OneAtATimeInThisProgramAndInOthersAndNoneAfterAKill) {
  const fs::path folder = fs::temp_directory_path() / cat("everlong_lock_", ::getpid());
  ASSERT_TRUE(make_directories(folder).ok());
  std::optional<FolderLock> mine;
  {
    auto lock = FolderLock::take(folder, "another test");
    ASSERT_TRUE(lock.ok()) << lock.status().message();
    mine.emplace(*std::move(lock));
  }
  const auto second = FolderLock::take(folder, "another test");
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("another test is at work in this folder"),
            std::string::npos);
  mine.reset();

  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const ::pid_t child = ::fork();
  if (child == 0) {
    const auto lock = FolderLock::take(folder, "another test");
    const char done = lock.ok() ? 'y' : 'n';
    if (::write(ready[1], &done, 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  char done = 0;
  ASSERT_EQ(::read(ready[0], &done, 1), 1);
  EXPECT_EQ(done, 'y');
  EXPECT_FALSE(FolderLock::take(folder, "another test").ok());
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(FolderLock::take(folder, "another test").ok());
  EXPECT_TRUE(fs::is_empty(folder));  // it leaves nothing behind
  fs::remove_all(folder);
  EXPECT_FALSE(FolderLock::take(folder, "another test").ok());
}

}  // namespace
}  // namespace everlong
