// One writer at a time in a folder.
#pragma once
#include <utility>

#include "core/files.h"

namespace everlong {

// An advisory lock (flock) on the folder itself: it leaves no file behind and ends with its
// program, however that ends. Where a file system has no such locks, everyone gets one.
class FolderLock {
 public:
  // Refused while another program, or another FolderLock of this one, holds it. `what` says for the
  // message who that may be: "another training".
  static Result<FolderLock> take(const fs::path& folder, std::string_view what);
  FolderLock(FolderLock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  FolderLock& operator=(FolderLock&&) = delete;
  ~FolderLock();

 private:
  explicit FolderLock(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

}  // namespace everlong
