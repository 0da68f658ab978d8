// What the fuzz targets share: bytes as a file, and the end of the program where a law is broken.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/files.h"

namespace everlong::fuzz {

// A folder of this process in memory where there is one, removed at exit.
inline const fs::path& folder() {
  static const struct Folder {
    fs::path path;
    Folder() {
      const fs::path memory = "/dev/shm";
      path = (fs::exists(memory) ? memory : fs::temp_directory_path()) /
             cat("everlong_fuzz_", ::getpid());
      fs::create_directories(path);
    }
    ~Folder() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  } folder;
  return folder.path;
}

// Written over, not renamed into place: thousands of times a second.
inline fs::path file(const char* name, const std::uint8_t* data, std::size_t size) {
  const fs::path path = folder() / name;
  std::FILE* const out = std::fopen(path.c_str(), "wb");
  if (out == nullptr || std::fwrite(data, 1, size, out) != size || std::fclose(out) != 0)
    std::abort();
  return path;
}

inline void require(bool holds, const char* law) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", law);
  std::abort();
}

// A refusal has a reason.
template <class T>
bool accepted(const T& result) {
  if constexpr (requires { result.status(); })
    require(result.ok() || !result.status().message().empty(), "a refusal says why");
  else
    require(result.ok() || !result.message().empty(), "a refusal says why");
  return result.ok();
}

}  // namespace everlong::fuzz
