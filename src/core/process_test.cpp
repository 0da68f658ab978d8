#include "core/process.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

TEST(Process, PassesArgumentsUntouchedAndKeepsBothOutputs) {
  const auto result = run_process(
      {.command = {"sh", "-c", "printf %s \"$1\"; echo oops >&2; exit 3", "sh", "a b'*\"$HOME"}});
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->output, "a b'*\"$HOME");
  EXPECT_EQ(result->errors, "oops\n");
  EXPECT_EQ(result->exit_code, 3);
}

TEST(Process, InputLargerThanEveryBufferComesBackWhole) {
  std::string text;
  for (int i = 0; text.size() < 3'000'000; ++i) text += cat(i, "\n");
  const auto result = run_process({.command = {"cat"}, .input = text});
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->output, text);
}

TEST(Process, ChildThatStopsReadingEndsNothingElse) {
  const std::string text(2'000'000, 'x');
  const auto result = run_process({.command = {"head", "-c", "3"}, .input = text});
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->output, "xxx");
}

TEST(Process, FolderAndEnvironmentAreTheChilds) {
  const auto result =
      run_process({.command = {"sh", "-c", "pwd; echo $EVERLONG_X; test -n \"$PATH\""},
                   .folder = "/",
                   .environment = {{"EVERLONG_X", "1=2"}}});
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->output, "/\n1=2\n");
  EXPECT_EQ(result->exit_code, 0);
}

TEST(Process, MissingProgramIsNotFound) {
  const auto result = run_process({.command = {"everlong-no-such-program"}});
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().code(), StatusCode::kNotFound);
  EXPECT_NE(result.status().message().find("everlong-no-such-program"), std::string::npos);
}

TEST(Process, FailingReaderStopsTheProgram) {
  const auto result = run_process(
      {.command = {"yes"}, .output = [](std::string_view) { return io_error("disk full"); }});
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().message(), "disk full");
}

TEST(Process, SignalIsReported) {
  const auto killed = run_process({.command = {"sh", "-c", "kill -9 $$"}});
  ASSERT_TRUE(killed.ok());
  EXPECT_EQ(killed->exit_code, 137);
  const auto interrupted = run_process({.command = {"sh", "-c", "kill -2 $$"}});
  ASSERT_FALSE(interrupted.ok());
  EXPECT_EQ(interrupted.status().code(), StatusCode::kInterrupted);
}

}  // namespace
}  // namespace everlong
