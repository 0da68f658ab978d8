#include "data/fetch.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "data/prepare.h"

namespace everlong {
namespace {

// A PATH whose apt-get and dpkg are scripts of the test: "packages" are tar files of package_/, no
// network is touched.
class Fetch : public testing::Test {
 protected:
  Fetch() : path_(std::getenv("PATH")) {
    fs::create_directories(bin_);
    fs::create_directories(package_);
    program("apt-get",
            cat("test \"$1\" = download || exit 9\necho call >>", (folder_ / "calls").string(),
                "\ncd ", package_.string(), " && tar cf \"$OLDPWD/$2_1%3a2.3-4_all.deb\" ."));
    program("dpkg", "test \"$1\" = -x || exit 9\nmkdir -p \"$3\" && tar xf \"$2\" -C \"$3\"");
    set_path(cat(bin_.string(), ":", path_));
  }
  ~Fetch() override {
    set_path(path_);
    fs::remove_all(folder_);
  }

  static void set_path(const std::string& value) { ::setenv("PATH", value.c_str(), 1); }
  void program(const std::string& name, const std::string& body) {
    std::ofstream(bin_ / name) << "#!/bin/sh\n" << body << "\n";
    fs::permissions(bin_ / name, fs::perms::owner_all);
  }
  void put(const std::string& name, std::string_view text) {
    fs::create_directories((package_ / name).parent_path());
    std::ofstream(package_ / name, std::ios::binary) << text;
  }
  std::string got(const std::string& name) {
    auto text = read_file(out_ / name);
    return text.ok() ? *text : text.status().message();
  }
  std::size_t calls() {
    const auto text = read_file(folder_ / "calls");
    return text.ok() ? text->size() / 5 : 0;
  }
  // Everything directly in out_: a failed fetch leaves nothing.
  std::size_t left() {
    std::error_code error;
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(out_, error), fs::directory_iterator()));
  }

  const std::string path_;
  const fs::path folder_ = fs::path(testing::TempDir()) / cat("everlong-fetch-", ::getpid());
  const fs::path bin_ = folder_ / "bin", package_ = folder_ / "package", out_ = folder_ / "out";
};

TEST_F(Fetch, TakesTheTextFilesAndNotesWhereTheyComeFrom) {
  put("usr/share/doc/python3.11/html/_sources/a.rst.txt", "A\n");
  put("usr/share/doc/python3.11/html/_sources/sub/b.rst.txt", "BB\n");
  put("usr/share/doc/python3.11/html/index.html", "<p>no");
  fs::create_symlink("a.rst.txt", package_ / "usr/share/doc/python3.11/html/_sources/link.rst.txt");
  std::vector<std::string> lines;
  const auto report =
      fetch("python-doc", out_, {.say = [&](const std::string& line) { lines.push_back(line); }});
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->files, 2);
  EXPECT_EQ(report->bytes, 5);
  EXPECT_EQ(report->version, "1:2.3-4");
  EXPECT_FALSE(report->already_there);
  EXPECT_EQ(got("python-doc/a.rst.txt"), "A\n");
  EXPECT_EQ(got("python-doc/sub/b.rst.txt"), "BB\n");
  EXPECT_EQ(got("python-doc/SOURCE.txt"),
            "everlong-corpus-1\npackage: python3.11-doc\nversion: 1:2.3-4\nrules: 1\nfiles: "
            "2\nbytes: 5\n");
  EXPECT_EQ(left(), 1u);
  EXPECT_EQ(lines.size(), 2u);
  // What fetch makes, prepare takes, without the note.
  const auto prepared = prepare({out_ / "python-doc"}, folder_ / "data", {});
  ASSERT_TRUE(prepared.ok());
  EXPECT_EQ(prepared->files, 2);
}

TEST_F(Fetch, SecondTimeDoesNothingUnlessForced) {
  put("x/a.pod", "=head1 A\n");
  ASSERT_TRUE(fetch("perl-doc", out_).ok());
  set_path("/nonexistent");
  const auto again = fetch("perl-doc", out_);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_TRUE(again->already_there);
  EXPECT_EQ(again->files, 1);
  EXPECT_EQ(again->version, "1:2.3-4");
  EXPECT_EQ(calls(), 1u);
  set_path(cat(bin_.string(), ":", path_));
  put("x/a.pod", "=head1 B\n");
  const auto forced = fetch("perl-doc", out_, {.force = true});
  ASSERT_TRUE(forced.ok());
  EXPECT_FALSE(forced->already_there);
  EXPECT_EQ(got("perl-doc/a.pod"), "=head1 B\n");
  EXPECT_EQ(left(), 1u);
}

TEST_F(Fetch, TextOfOtherRulesIsMadeAnew) {
  put("x/a.pod", "=head1 A\n");
  ASSERT_TRUE(fetch("perl-doc", out_).ok());
  std::string note = got("perl-doc/SOURCE.txt");
  note.replace(note.find("rules: 1"), 8, "rules: 0");
  std::ofstream(out_ / "perl-doc/SOURCE.txt") << note;
  EXPECT_FALSE(fetch("perl-doc", out_)->already_there);
  EXPECT_EQ(calls(), 2u);
}

TEST_F(Fetch, FolderThatNoFetchMadeIsRefusedEvenByForce) {
  fs::create_directories(out_ / "perl-doc");
  std::ofstream(out_ / "perl-doc/thesis.txt") << "mine";
  for (const bool force : {false, true}) {
    const auto result = fetch("perl-doc", out_, {.force = force});
    ASSERT_FALSE(result.ok());
    EXPECT_NE(result.status().message().find("was not made by fetch"), std::string::npos);
  }
  EXPECT_EQ(got("perl-doc/thesis.txt"), "mine");
}

TEST_F(Fetch, HtmlBecomesText) {
  put("doc/one.html",
      "<html><head><title>T</title><style>p{}</style></head><body><div "
      "class=\"navheader\"><div>Prev</div></div>"
      "<h1>One &amp; two</h1><script>x()</script><p>First\n  "
      "line,\n<b>bold</b>.</p><ul><li><p>item</p><li>more</ul>"
      "<pre>\n a\n   "
      "b\n</pre><nav>Next</nav><table><tr><td>x</td><td>y</td></tr></table></body></html>");
  put("doc/two.html", "<p>caf\xe9</p>");  // Latin-1 without saying so
  const auto report = fetch("vim-doc", out_);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->files, 2);
  EXPECT_EQ(got("vim-doc/one.txt"),
            "One & two\n\nFirst line, bold.\n\n- item\n\n- more\n\n a\n   b\n\nx  y\n");
  EXPECT_EQ(got("vim-doc/two.txt"), "caf\xc3\xa9\n");
}

TEST_F(Fetch, CompressedDictionaryIsUnpacked) {
  put("usr/share/dictd/gcide.dict", "word: meaning\n");
  ASSERT_EQ(
      std::system(cat("gzip -S .dz ", (package_ / "usr/share/dictd/gcide.dict").string()).c_str()),
      0);
  const auto report = fetch("gcide", out_);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(got("gcide/gcide.txt"), "word: meaning\n");
}

TEST_F(Fetch, ArchiveInThePackageIsUnpackedWithoutItsRegisterTables) {
  const fs::path tree = folder_ / "linux-source-6.1";
  fs::create_directories(tree / "kernel");
  fs::create_directories(tree / "drivers/gpu/drm/amd/include");
  std::ofstream(tree / "kernel/fork.c") << "int fork;\n";
  std::ofstream(tree / "kernel/fork.o") << "object";
  std::ofstream(tree / "README.rst") << "Linux\n";
  std::ofstream(tree / "drivers/gpu/drm/amd/include/table.h") << "#define A 1\n";
  fs::create_directories(package_ / "usr/src");
  const fs::path tar = package_ / "usr/src/linux-source-6.1.tar.xz";
  ASSERT_EQ(
      std::system(
          cat("tar cJf ", tar.string(), " -C ", folder_.string(), " linux-source-6.1").c_str()),
      0);
  const auto report = fetch("linux-source", out_);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->files, 2);
  EXPECT_EQ(got("linux-source/kernel/fork.c"), "int fork;\n");
  EXPECT_EQ(got("linux-source/README.rst"), "Linux\n");
}

TEST_F(Fetch, FailuresSayWhatToRunAndLeaveNothing) {
  const auto message = [&](const std::string& name) {
    const auto result = fetch(name, out_);
    EXPECT_FALSE(result.ok());
    EXPECT_EQ(left(), 0u);
    EXPECT_EQ(result.status().message().find('\n'), std::string::npos) << result.status().message();
    return result.status().message();
  };
  const auto has = [](const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
  };
  const std::string empty = message("perl-doc");
  EXPECT_TRUE(has(empty, "holds no .pod file")) << empty;
  program("dpkg", "echo 'dpkg-deb: error: short read' >&2; exit 2");
  const std::string broken = message("perl-doc");
  EXPECT_TRUE(has(broken, "exit code 2 (dpkg-deb: error: short read)")) << broken;
  program("apt-get", "echo 'E: Unable to locate package perl-doc' >&2; exit 100");
  const std::string unknown = message("perl-doc");
  EXPECT_TRUE(has(unknown, "apt-get update")) << unknown;
  EXPECT_TRUE(has(unknown, "missing or old")) << unknown;
  program(
      "apt-get",
      "printf \"E: Failed to fetch x  Could not resolve 'host'\\nE: Some files\\n\" >&2; exit 100");
  const std::string offline = message("perl-doc");
  EXPECT_TRUE(has(offline, "Check the network")) << offline;
  EXPECT_TRUE(has(offline, "Could not resolve 'host'")) << offline;
  set_path("/nonexistent");
  const std::string no_apt = message("perl-doc");
  EXPECT_TRUE(has(no_apt, "everlong data prepare")) << no_apt;
}

TEST_F(Fetch, MissingPythonIsNamedWithTheCommandThatInstallsIt) {
  put("doc/one.html", "<p>x");
  for (const char* tool : {"sh", "tar", "mkdir"})  // all that the scripts need, and no python3
    fs::create_symlink(fs::exists(cat("/bin/", tool)) ? cat("/bin/", tool) : cat("/usr/bin/", tool),
                       bin_ / tool);
  set_path(bin_.string());
  const auto result = fetch("vim-doc", out_);
  ASSERT_FALSE(result.ok());
  EXPECT_NE(result.status().message().find("apt-get install python3"), std::string::npos)
      << result.status().message();
  EXPECT_EQ(left(), 0u);
}

TEST_F(Fetch, UnknownNameSaysWhatIsKnown) {
  const auto result = fetch("python-docs", out_);
  ASSERT_FALSE(result.ok());
  EXPECT_NE(result.status().message().find("Did you mean \"python-doc\"?"), std::string::npos);
  EXPECT_EQ(known_corpora().size(), 7u);
}

}  // namespace
}  // namespace everlong
