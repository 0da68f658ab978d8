#include "data/staging.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace everlong {
namespace {

// Leftovers of programs that no longer run.
void remove_leftovers(const fs::path& parent, const std::string& prefix) {
  std::error_code error;
  for (fs::directory_iterator entry(parent, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(prefix)) continue;
    const auto owner = parse_count(std::string_view(name).substr(prefix.size()));
    if (!owner || *owner <= 0) continue;
    const bool running = ::kill(static_cast<::pid_t>(*owner), 0) == 0 || errno == EPERM;
    std::error_code ignored;
    if (!running) fs::remove_all(entry->path(), ignored);
  }
}

}  // namespace

Result<StagingFolder> StagingFolder::create(const fs::path& parent, const std::string& name) {
  EVERLONG_RETURN_IF_ERROR(make_directories(parent));
  const std::string prefix = cat(".", name, ".part.");
  remove_leftovers(parent, prefix);
  const fs::path path = parent / cat(prefix, ::getpid());
  std::error_code error;
  fs::remove_all(path, error);
  if (!error) fs::create_directory(path, error);
  if (error) return io_error(path.string(), ": cannot create the folder: ", error.message());
  return StagingFolder(path);
}

StagingFolder::~StagingFolder() {
  std::error_code ignored;
  if (!path_.empty()) fs::remove_all(path_, ignored);
}

Status move_into_place(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error)
    return io_error(from.string(), ": cannot be moved to ", to.string(), ": ", error.message());
  return {};
}

}  // namespace everlong
