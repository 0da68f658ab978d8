// A folder in which something is put together before it is moved into place.
#pragma once
#include <string>

#include "core/files.h"

namespace everlong {

// "<parent>/.<name>.part.<pid>": beside its target, so that a rename moves it. Removed with
// everything in it when the object goes; leftovers of programs that were killed are removed by the
// next create(). Not thread safe.
class StagingFolder {
 public:
  static Result<StagingFolder> create(const fs::path& parent, const std::string& name);
  StagingFolder(StagingFolder&& other) noexcept : path_(std::move(other.path_)) {
    other.path_.clear();
  }
  StagingFolder& operator=(StagingFolder&&) = delete;
  ~StagingFolder();

  const fs::path& path() const { return path_; }

 private:
  explicit StagingFolder(fs::path path) : path_(std::move(path)) {}
  fs::path path_;
};

// Moves a file or folder within one file system; an existing file is replaced.
Status move_into_place(const fs::path& from, const fs::path& to);

}  // namespace everlong
