// Files that are never half-written, and files read through a memory map.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "core/status.h"

namespace everlong {

namespace fs = std::filesystem;

// Writes to "<path>.tmp.<pid>" beside the target; commit() syncs it to disk and renames it into
// place. Without a commit the target stays as it was and the temporary is removed. Not thread safe.
class AtomicFile {
 public:
  static Result<AtomicFile> create(const fs::path& path);
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();

  Status write(std::span<const std::byte> bytes);
  Status write(std::string_view text) { return write(std::as_bytes(std::span(text))); }
  // Over bytes that were written before, from byte `at` on; write() goes on at the end as ever.
  Status write_over(std::uint64_t at, std::string_view text);
  Status commit();

 private:
  AtomicFile(fs::path target, fs::path temporary, int descriptor);
  fs::path target_, temporary_;
  int descriptor_ = -1;
};

Status write_file(const fs::path& path, std::string_view text);
// Refuses files larger than `limit` bytes: a config of a gigabyte is a mistake, not a config.
Result<std::string> read_file(const fs::path& path, std::size_t limit = std::size_t{64} << 20);
Status make_directories(const fs::path& path);
// Within one file system; an existing file is replaced in one step that a crash does not undo.
Status rename_file(const fs::path& from, const fs::path& to);

// Read-only map of a whole file; the bytes stay valid while the object lives. Thread safe to read.
class MappedFile {
 public:
  static Result<MappedFile> open(const fs::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const fs::path& path() const { return path_; }
  // Lets go of the memory that reading `part` (of bytes()) took; reading it again costs a read of
  // the file. So a file larger than memory can be read from end to end. Whole pages only.
  void release(std::span<const std::byte> part) const;

 private:
  MappedFile(fs::path path, const std::byte* data, std::size_t size);
  fs::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace everlong
