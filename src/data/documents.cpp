#include "data/documents.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace everlong {
namespace {

constexpr std::size_t kLookedAt = 64 << 10;

constexpr std::array<std::string_view, 12> kTextEndings = {
    ".txt", ".text", ".rst", ".md", ".c", ".h", ".cpp", ".py", ".pod", ".html", ".htm", ".tex"};

bool has_text_ending(const fs::path& path) {
  std::string ending = path.extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(), [](char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  });
  return ending.empty() ||
         std::find(kTextEndings.begin(), kTextEndings.end(), ending) != kTextEndings.end();
}

// Bytes of the UTF-8 character at the front (RFC 3629): 0 when there is none, -1 when `text` ends
// within it.
int character_bytes(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xc2 || first > 0xf4) return 0;
  const std::size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return -1;
    unsigned low = 0x80, high = 0xbf;
    if (i == 1) {  // overlong forms, surrogates, beyond U+10FFFF
      if (first == 0xe0) low = 0xa0;
      if (first == 0xed) high = 0x9f;
      if (first == 0xf0) low = 0x90;
      if (first == 0xf4) high = 0x8f;
    }
    if (byte(i) < low || byte(i) > high) return 0;
  }
  return static_cast<int>(length);
}

// Where to end a document in a stretch after which the file goes on.
std::size_t cut(std::string_view stretch) {
  const std::size_t half = stretch.size() / 2;  // no crumbs, and each byte is read at most twice
  const std::size_t blank = stretch.rfind("\n\n");
  if (blank != std::string_view::npos && blank >= half) return blank + 2;
  const std::size_t line = stretch.rfind('\n');
  if (line != std::string_view::npos && line >= half) return line + 1;
  for (std::size_t back = 0; back < 4 && back + 1 < stretch.size(); ++back) {
    const std::size_t end = stretch.size() - back;
    const bool inside = (static_cast<unsigned char>(stretch[end - 1]) & 0x80) != 0;
    if (!inside) return end;
    if ((static_cast<unsigned char>(stretch[end - 1]) & 0xc0) == 0xc0)
      return character_bytes(stretch.substr(end - 1)) > 0 ? stretch.size() : end - 1;
  }
  return stretch.size();
}

class Walk {
 public:
  Walk(const WalkOptions& options, SkipCounts& skipped, std::vector<TextFile>& found)
      : options_(options), skipped_(skipped), found_(found) {}

  void folder(const fs::path& path) {
    std::error_code error;
    if (!options_.leave_out.empty() && fs::equivalent(path, options_.leave_out, error)) return;
    std::vector<fs::directory_entry> entries;
    for (fs::directory_iterator entry(path, error), end; !error && entry != end;
         entry.increment(error))
      entries.push_back(*entry);
    if (error) {
      ++skipped_["folder that cannot be read"];
      return;
    }
    std::sort(entries.begin(), entries.end(),
              [](const auto& a, const auto& b) { return a.path().native() < b.path().native(); });
    for (const auto& entry : entries) {
      const auto status = entry.symlink_status(error);
      const bool is_folder = fs::is_directory(status);
      if (entry.path().filename().native().starts_with('.')) {
        ++skipped_["hidden"];
      } else if (fs::is_symlink(status)) {
        ++skipped_["symbolic link"];
      } else if (is_folder) {
        folder(entry.path());
      } else if (!fs::is_regular_file(status)) {
        ++skipped_["not a regular file"];
      } else if (!options_.all_files && !has_text_ending(entry.path())) {
        ++skipped_["other ending"];
      } else {
        file(entry.path());
      }
    }
  }

  void file(const fs::path& path) {
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    std::ifstream stream(path, std::ios::binary);
    std::string start(std::min<std::uint64_t>(error ? 0 : bytes, kLookedAt), '\0');
    if (error || !stream ||
        !stream.read(start.data(), static_cast<std::streamsize>(start.size()))) {
      ++skipped_["cannot be read"];
    } else if (start.size() == bytes &&
               start.find_first_not_of(" \t\r\n\f\v") == std::string::npos) {
      ++skipped_["empty"];
    } else if (!looks_like_text(start, start.size() == bytes)) {
      ++skipped_["not UTF-8 text"];
    } else if (path.filename() == "SOURCE.txt" && start.starts_with(kSourceMarker)) {
      ++skipped_["note about a fetched corpus"];
    } else {
      found_.push_back({path, static_cast<std::int64_t>(bytes)});
    }
  }

 private:
  const WalkOptions& options_;
  SkipCounts& skipped_;
  std::vector<TextFile>& found_;
};

}  // namespace

bool looks_like_text(std::string_view text, bool complete) {
  while (!text.empty()) {
    if (text.front() == '\0') return false;
    const int bytes = character_bytes(text);
    if (bytes < 0) return !complete;
    if (bytes == 0) return false;
    text.remove_prefix(static_cast<std::size_t>(bytes));
  }
  return true;
}

Result<std::vector<TextFile>> find_text_files(const std::vector<fs::path>& paths,
                                              const WalkOptions& options, SkipCounts& skipped) {
  std::vector<TextFile> found;
  Walk walk(options, skipped, found);
  for (const fs::path& path : paths) {
    std::error_code error;
    const auto status = fs::status(path, error);
    if (!fs::exists(status)) return not_found(path.string(), ": no such file or folder");
    if (fs::is_directory(status)) {
      walk.folder(path);
    } else if (fs::is_regular_file(status)) {
      walk.file(path);
    } else {
      return invalid_argument(path.string(), ": is neither a file nor a folder");
    }
  }
  return found;
}

Result<DocumentReader> DocumentReader::open(const fs::path& path, std::int64_t max_bytes) {
  std::error_code error;
  const auto bytes = fs::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file)
    return io_error(path.string(),
                    ": cannot be read: ", error ? error.message() : std::strerror(errno));
  return DocumentReader(path, std::move(file), static_cast<std::int64_t>(bytes),
                        std::max<std::int64_t>(max_bytes, 4));
}

Result<bool> DocumentReader::next(std::string& text, std::int64_t& offset) {
  text = std::exchange(rest_, {});
  offset = offset_;
  const std::int64_t had = static_cast<std::int64_t>(text.size()),
                     more = std::min(unread_, max_bytes_ - had);
  text.resize(static_cast<std::size_t>(had + more));
  if (!file_.read(text.data() + had, more))
    return io_error(path_.string(), ": cannot read on at ", offset_ + had,
                    ": it was cut short meanwhile");
  unread_ -= more;
  if (unread_ > 0) {
    const std::size_t end = cut(text);
    rest_ = text.substr(end);
    text.resize(end);
  }
  offset_ += static_cast<std::int64_t>(text.size());
  return !text.empty();
}

Result<std::string> read_part(const fs::path& path, std::int64_t offset, std::int64_t bytes) {
  std::string text(static_cast<std::size_t>(bytes), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.seekg(offset) || !file.read(text.data(), bytes))
    return io_error(path.string(), ": cannot read ", bytes, " bytes at ", offset,
                    ": it is gone or was cut short");
  return text;
}

}  // namespace everlong
