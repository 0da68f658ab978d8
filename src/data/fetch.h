// Texts that everybody on Debian can get: documentation packages, unpacked into plain text files.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/files.h"

namespace everlong {

struct CorpusInfo {
  std::string name;     // "python-doc"
  std::string package;  // "python3.11-doc"
  std::string about;    // "reference and tutorials of Python, reStructuredText, 11 MB"
};
std::vector<CorpusInfo> known_corpora();

struct FetchOptions {
  bool force = false;                                // fetch again what is there already
  std::function<void(const std::string&)> say = {};  // one line for each step begun
};

struct FetchReport {
  std::string name, package, version;
  fs::path folder;
  std::int64_t files = 0, bytes = 0;
  bool already_there = false;
};

// Makes out/NAME with text files and SOURCE.txt (where they come from). What an earlier fetch made
// is left as it is; a folder of that name which no fetch made is refused. Downloads into a folder
// beside it that goes again on failure. Runs apt-get, dpkg and, where the text is packed or HTML,
// tar, gzip or python3. Draws progress on stderr.
Result<FetchReport> fetch(const std::string& name, const fs::path& out,
                          const FetchOptions& options = {});

}  // namespace everlong
