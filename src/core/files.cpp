#include "core/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>

namespace everlong {
namespace {

Status failed(std::string_view what, const fs::path& path) {
  const int error = errno;
  const auto code = error == ENOENT ? StatusCode::kNotFound : StatusCode::kIo;
  return {code, cat(path.string(), ": cannot ", what, ": ", std::strerror(error))};
}

// Writing goes to a temporary, so the target never changes when it fails.
Status write_failed(const fs::path& target) {
  const int error = errno;
  const fs::path folder = target.has_parent_path() ? target.parent_path() : fs::path(".");
  std::error_code ignored;
  if (error == ENOENT && !fs::exists(folder, ignored))
    return not_found(target.string(), ": cannot write: there is no folder ", folder.string(),
                     "; make it first");
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  return io_error(target.string(), ": cannot write: ", std::strerror(error),
                  fs::exists(target, ignored) ? "; the file is as it was" : "; nothing was written",
                  full ? ". Make room, or write elsewhere" : "");
}

}  // namespace

AtomicFile::AtomicFile(fs::path target, fs::path temporary, int descriptor)
    : target_(std::move(target)), temporary_(std::move(temporary)), descriptor_(descriptor) {}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : target_(std::move(other.target_)),
      temporary_(std::move(other.temporary_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

Result<AtomicFile> AtomicFile::create(const fs::path& path) {
  fs::path temporary = path;
  temporary += cat(".tmp.", ::getpid());
  const int descriptor = ::open(temporary.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
  if (descriptor < 0) return write_failed(path);
  return AtomicFile(path, std::move(temporary), descriptor);
}

Status AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ::ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return write_failed(target_);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return {};
}

Status AtomicFile::write_over(std::uint64_t at, std::string_view text) {
  while (!text.empty()) {
    const ::ssize_t written =
        ::pwrite(descriptor_, text.data(), text.size(), static_cast<::off_t>(at));
    if (written < 0) {
      if (errno == EINTR) continue;
      return write_failed(target_);
    }
    at += static_cast<std::uint64_t>(written);
    text.remove_prefix(static_cast<std::size_t>(written));
  }
  return {};
}

Status AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) return write_failed(target_);
  if (::close(std::exchange(descriptor_, -1)) != 0) {
    const Status status = write_failed(target_);
    ::unlink(temporary_.c_str());
    return status;
  }
  const Status status = rename_file(temporary_, target_);
  if (!status.ok()) ::unlink(temporary_.c_str());
  return status;
}

Status rename_file(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) return failed("rename into place", from);
  // The rename itself is durable only once the folder is.
  const fs::path folder = to.has_parent_path() ? to.parent_path() : fs::path(".");
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    ::fsync(descriptor);
    ::close(descriptor);
  }
  return {};
}

Status write_file(const fs::path& path, std::string_view text) {
  EVERLONG_ASSIGN(auto file, AtomicFile::create(path));
  EVERLONG_RETURN_IF_ERROR(file.write(text));
  return file.commit();
}

Result<std::string> read_file(const fs::path& path, std::size_t limit) {
  EVERLONG_ASSIGN(const auto file, MappedFile::open(path));
  const auto bytes = file.bytes();
  if (bytes.size() > limit)
    return invalid_argument(path.string(), ": ", bytes.size(), " bytes; at most ", limit,
                            " are read here");
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Status make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) return io_error(path.string(), ": cannot create the folder: ", error.message());
  return {};
}

MappedFile::MappedFile(fs::path path, const std::byte* data, std::size_t size)
    : path_(std::move(path)), data_(data), size_(size) {}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(std::span<const std::byte> part) const {
  // Pages shared with what lies before or after may go as well: what is read again comes back. And
  // some before: where a file is read in order, each new page brings a window of pages around it
  // (64 KiB on Linux), those behind it too.
  constexpr std::ptrdiff_t kBehind = 1 << 20;
  if (part.empty()) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::byte* const from = part.data() - std::min(kBehind, part.data() - data_);
  const auto first = reinterpret_cast<std::uintptr_t>(from) / page * page;
  const auto last = reinterpret_cast<std::uintptr_t>(part.data() + part.size());
  // Advice: where it fails, memory is only freed later.
  ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

Result<MappedFile> MappedFile::open(const fs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return failed("open", path);
  struct ::stat about {};
  if (::fstat(descriptor, &about) != 0) {
    const Status status = failed("stat", path);
    ::close(descriptor);
    return status;
  }
  if (!S_ISREG(about.st_mode)) {
    ::close(descriptor);
    return io_error(path.string(), ": is not a regular file");
  }
  const auto size = static_cast<std::size_t>(about.st_size);
  void* data = nullptr;
  if (size > 0) data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  const int map_error = errno;
  ::close(descriptor);
  if (data == MAP_FAILED) {
    errno = map_error;
    return failed("map", path);
  }
  return MappedFile(path, static_cast<const std::byte*>(data), size);
}

}  // namespace everlong
