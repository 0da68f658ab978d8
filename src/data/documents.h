// Finding text files and cutting them into documents.
#pragma once
#include <cstdint>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "core/files.h"

namespace everlong {

// First line of the SOURCE.txt that `everlong data fetch` leaves in a corpus: a note about the
// text, not text.
inline constexpr std::string_view kSourceMarker = "everlong-corpus-1";

// Why files were left out, and how many.
using SkipCounts = std::map<std::string, std::int64_t>;

struct TextFile {
  fs::path path;
  std::int64_t bytes = 0;
};

struct WalkOptions {
  bool all_files = false;  // take every file that is text, whatever its ending
  fs::path leave_out;      // a folder not to enter: the one being written
};

// The text files below each path: in the order of `paths`, and within one by name. Symbolic links
// and hidden entries below a path are not followed; a path that is itself a file is taken whatever
// its name. What is text is decided by looks_like_text() on the first 64 KiB. Fails on a path that
// does not exist.
Result<std::vector<TextFile>> find_text_files(const std::vector<fs::path>& paths,
                                              const WalkOptions& options, SkipCounts& skipped);

// Valid UTF-8 without NUL. `complete`: the text ends here; else its last character may be cut.
bool looks_like_text(std::string_view text, bool complete);

// Reads a file as documents of at most `max_bytes`: whole when it is small, else cut after the last
// blank line of each such stretch (after a line, or between characters, when its second half has no
// blank line). Not thread safe.
class DocumentReader {
 public:
  static Result<DocumentReader> open(const fs::path& path, std::int64_t max_bytes);
  // The next document, or false at the end of the file. `offset` is where in the file it lies.
  Result<bool> next(std::string& text, std::int64_t& offset);

 private:
  DocumentReader(fs::path path, std::ifstream file, std::int64_t file_bytes, std::int64_t max_bytes)
      : path_(std::move(path)),
        file_(std::move(file)),
        unread_(file_bytes),
        max_bytes_(max_bytes) {}
  fs::path path_;
  std::ifstream file_;
  std::int64_t unread_, max_bytes_, offset_ = 0;
  std::string rest_;  // read, but beyond the last cut
};

// `bytes` bytes from `offset`; fails when the file has become shorter.
Result<std::string> read_part(const fs::path& path, std::int64_t offset, std::int64_t bytes);

}  // namespace everlong
