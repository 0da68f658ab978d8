#include "train/checkpoint_file.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstdio>

#include "models/checked_file.h"

namespace everlong {

Status write_checkpoint(const fs::path& path, const TensorFile& content) {
  return write_checked(path, content, kCheckpointFormat);
}

Result<TensorFile> read_checkpoint(const fs::path& path) {
  return read_checked(path, kCheckpointFormat, "a training checkpoint");
}

std::string short_hash(std::string_view text) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(text.data(), text.size())));
  return digits;
}

Result<std::string> metadata_entry(const TensorFile& content, const std::string& key) {
  const auto found = content.metadata.find(key);
  if (found == content.metadata.end()) return corrupt("metadata \"", key, "\" is missing");
  return found->second;
}

Result<std::int64_t> metadata_count(const TensorFile& content, const std::string& key) {
  EVERLONG_ASSIGN(const std::string text, metadata_entry(content, key));
  const auto count = parse_count(text);
  if (!count || *count < 0 || std::to_string(*count) != text)
    return corrupt("metadata ", key, " = \"", text, "\" is not a count");
  return *count;
}

}  // namespace everlong
