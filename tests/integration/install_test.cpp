// What `cmake --install` makes, as somebody meets it who has neither our sources nor our build
// folder: moved to another place, found by CMake, built against, run.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "core/process.h"
#include "core/text.h"

namespace everlong {
namespace {

class Install : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder = fs::temp_directory_path() / cat("everlong_install_", ::getpid());
    ASSERT_TRUE(make_directories(folder).ok());
    const auto installed =
        run({EVERLONG_CMAKE, "--install", EVERLONG_BUILD_FOLDER, "--prefix", path("first")});
    ASSERT_EQ(installed.exit_code, 0) << installed.output << installed.errors;
    fs::rename(path("first"), path("prefix"));
    fs::copy(fs::path(EVERLONG_SOURCE_FOLDER) / "examples", path("examples"),
             fs::copy_options::recursive);
  }
  static void TearDownTestSuite() {
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }
  static std::string path(const std::string& name) { return (folder / name).string(); }
  static ProcessResult run(std::vector<std::string> command) {
    const auto result =
        run_process({.command = std::move(command),
                     .environment = {{"OMP_WAIT_POLICY", "passive"}, {"OMP_NUM_THREADS", "2"}}});
    return result.ok() ? *result : ProcessResult{-1, "", result.status().message()};
  }
  static ProcessResult configure(const std::string& build, std::vector<std::string> more = {}) {
    std::vector<std::string> command = {EVERLONG_CMAKE,
                                        "-S",
                                        path("examples"),
                                        "-B",
                                        path(build),
                                        cat("-DCMAKE_PREFIX_PATH=", path("prefix")),
                                        cat("-DCMAKE_CXX_COMPILER=", EVERLONG_COMPILER)};
    command.insert(command.end(), more.begin(), more.end());
    return run(std::move(command));
  }
  // CMake breaks its messages into lines.
  static bool says(const ProcessResult& result, std::string_view part) {
    std::istringstream words(result.errors);
    std::string text;
    for (std::string word; words >> word;) text += word + " ";
    return text.find(part) != std::string::npos;
  }
  static inline fs::path folder;
};

TEST_F(Install, ExamplesAreBuiltAndRunOnThePackageAlone) {
  const auto configured = configure("build");
  ASSERT_EQ(configured.exit_code, 0) << configured.output << configured.errors;
  const auto built = run({EVERLONG_CMAKE, "--build", path("build")});
  ASSERT_EQ(built.exit_code, 0) << built.output << built.errors;

  ASSERT_TRUE(make_directories(path("text")).ok());
  std::string book;
  for (int file = 0; file < 6; ++file) {
    std::string text;
    for (int line = 1; line < 200; ++line)
      text += cat("the stream ", (file + 3) * line * 7919 % 1000, " goes on and never ends\n");
    ASSERT_TRUE(write_file(path(cat("text/", file, ".txt")), text).ok());
    book += text;
  }
  ASSERT_TRUE(write_file(path("book.txt"), book).ok());
  const auto trained = run({path("build/train"), path("run"), path("text")});
  ASSERT_EQ(trained.exit_code, 0) << trained.output << trained.errors;
  EXPECT_NE(trained.output.find("step 40: loss "), std::string::npos) << trained.output;
  EXPECT_NE(trained.output.find("bits per byte on held-out text"), std::string::npos);

  const std::vector<std::string> stream = {path("build/stream"), path("run/model"),
                                           path("book.txt"), path("book.state")};
  const auto first = run(stream), second = run(stream);
  ASSERT_EQ(first.exit_code, 0) << first.output << first.errors;
  EXPECT_TRUE(first.output.starts_with(cat(book.size(), " tokens read, "))) << first.output;
  EXPECT_EQ(second.output, first.output) << "the saved state goes on where the text did";
  EXPECT_NE(first.output.find("seed 2: "), std::string::npos);
  EXPECT_EQ(run({path("build/stream"), path("none"), path("book.txt"), path("s")}).exit_code, 1);

  const auto program = run({path("prefix/bin/everlong"), "info", "--model", path("run/model")});
  EXPECT_EQ(program.exit_code, 0) << program.errors;
}

TEST_F(Install, AnotherVersionIsNotTaken) {
  const std::string lists = *read_file(path("examples/CMakeLists.txt"));
  for (const char* const version : {"0.2", "1.0", "0.1.99"}) {
    std::string changed = lists;
    changed.replace(changed.find("Everlong 0.1"), 12, cat("Everlong ", version));
    ASSERT_TRUE(write_file(path("examples/CMakeLists.txt"), changed).ok());
    EXPECT_NE(configure(cat("build-", version)).exit_code, 0) << version;
  }
  ASSERT_TRUE(write_file(path("examples/CMakeLists.txt"), lists).ok());
}

TEST_F(Install, AMissingOrOtherLibTorchIsSaid) {
  const auto missing = configure("build-missing", {"-DLIBTORCH_ROOT=/nowhere"});
  EXPECT_NE(missing.exit_code, 0);
  EXPECT_TRUE(says(missing, "is not in '/nowhere' (LIBTORCH_ROOT)")) << missing.errors;
  EXPECT_TRUE(says(missing, "Give -DLIBTORCH_ROOT=")) << missing.errors;

  const fs::path other = folder / "torch";
  ASSERT_TRUE(make_directories(other / "include/torch/headeronly").ok());
  ASSERT_TRUE(make_directories(other / "lib").ok());
  ASSERT_TRUE(write_file(other / "lib/libtorch_cpu.so", "").ok());
  ASSERT_TRUE(write_file(other / "include/torch/headeronly/version.h",
                         "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 99\n"
                         "#define TORCH_VERSION_PATCH 0\n")
                  .ok());
  const auto newer =
      configure("build-other", {cat("-DTorch_DIR=", (other / "share/cmake/Torch").string())});
  EXPECT_NE(newer.exit_code, 0);
  EXPECT_TRUE(says(newer, "is 2.99.0; Everlong was built for")) << newer.errors;
}

// The whole engine and parts of torch's headers are inside; nothing of them may be seen, or two
// libraries in one process would meet. A symbol that comes or goes is a change of the interface.
TEST_F(Install, ExportsThePublicInterfaceAndNothingElse) {
  fs::path library;
  for (const auto& entry : fs::recursive_directory_iterator(path("prefix")))
    if (entry.path().filename() == "libeverlong.so") library = entry.path();
  ASSERT_FALSE(library.empty());
  const auto listed = run({"nm", "-D", "--defined-only", "--demangle", library.string()});
  ASSERT_EQ(listed.exit_code, 0) << listed.errors;
  std::set<std::string> symbols;
  std::istringstream lines(listed.output);
  for (std::string line; std::getline(lines, line);) symbols.insert(line.substr(19));
  const std::string expected =
      *read_file(fs::path(EVERLONG_TEST_DATA) / "integration/library_symbols.txt");
  std::string found;
  for (const auto& symbol : symbols) found += symbol + "\n";
  EXPECT_EQ(found, expected);
}

// The readers of README copy what has been compiled.
TEST_F(Install, TheReadmeShowsAnExampleAsItIs) {
  const std::string readme = *read_file(fs::path(EVERLONG_SOURCE_FOLDER) / "README.md");
  EXPECT_NE(readme.find(cat("```cpp\n", *read_file(path("examples/stream.cpp")), "```")),
            std::string::npos);
  for (const char* const example : {"stream.cpp", "train.cpp"}) {
    const std::string text = *read_file(path(cat("examples/", example)));
    EXPECT_LT(std::count(text.begin(), text.end(), '\n'), 60) << example;
  }
}

TEST_F(Install, HeadersAreOursAlone) {
  int headers = 0;
  for (const auto& entry : fs::recursive_directory_iterator(path("prefix/include"))) {
    if (!entry.is_regular_file()) continue;
    ++headers;
    std::istringstream lines(*read_file(entry.path()));
    for (std::string line; std::getline(lines, line);)
      if (line.starts_with("#include"))
        EXPECT_TRUE(line.starts_with("#include <everlong/") || line.find('/') == std::string::npos)
            << entry.path() << ": " << line;
  }
  EXPECT_EQ(headers, 5);
}

}  // namespace
}  // namespace everlong
