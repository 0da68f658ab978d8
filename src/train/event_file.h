// Figures of a run for TensorBoard: docs/formats.md, "Events". The format is small and fixed, so no
// library is needed: TFRecord framing around two protobuf messages
// (tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto).
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/files.h"

namespace everlong {

using Scalars = std::vector<std::pair<std::string, double>>;  // tag, value

// One record: length, data and their checksums.
std::string event_record(std::string_view data);
// The messages, without framing. Seconds are since 1970.
std::string version_event(double seconds);
std::string session_start_event(double seconds, std::int64_t step);
std::string scalars_event(double seconds, std::int64_t step, const Scalars& scalars);

// Appends to a file of its own. Not thread safe.
class EventFile {
 public:
  // A new file in the folder, after those that are there in the order of their names. A run that
  // goes on says with `first_step` from which step on older files do not count any more; < 0: none
  // do not.
  static Result<EventFile> create(const fs::path& folder, std::int64_t first_step);
  EventFile(EventFile&& other) noexcept;
  EventFile& operator=(EventFile&&) = delete;
  ~EventFile();

  // In the system's hands when it returns, as one write.
  Status add(std::int64_t step, const Scalars& scalars);
  // Removes all event files of the folder.
  static Status clear(const fs::path& folder);

 private:
  EventFile(fs::path path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  Status append(const std::string& bytes);
  fs::path path_;
  int descriptor_;
};

}  // namespace everlong
