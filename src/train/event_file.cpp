#include "train/event_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "core/crc32c.h"

namespace everlong {
namespace {

constexpr std::string_view kEventsBegin = "events.out.tfevents.";

// Little endian, as everything here.
template <class T>
std::string raw_bytes(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

std::string masked_crc(std::string_view bytes) {
  const std::uint32_t crc = crc32c(bytes);
  return raw_bytes(((crc >> 15) | (crc << 17)) + 0xa282ead8U);
}

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 128; value >>= 7) bytes += static_cast<char>(value | 128);
  return bytes + static_cast<char>(value);
}

// Protobuf wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
std::string field_key(int number, int wire_type) {
  return varint(static_cast<std::uint64_t>(number << 3 | wire_type));
}
std::string field(int number, std::string_view bytes) {
  return field_key(number, 2) + varint(bytes.size()) + std::string(bytes);
}
std::string field(int number, double value) { return field_key(number, 1) + raw_bytes(value); }
std::string field(int number, float value) { return field_key(number, 5) + raw_bytes(value); }
std::string field(int number, std::int64_t value) {
  return field_key(number, 0) + varint(static_cast<std::uint64_t>(value));
}

// Event: 1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log.
constexpr int kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7;

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

bool is_event_file(const fs::path& path) {
  return path.filename().native().starts_with(kEventsBegin);
}

}  // namespace

std::string event_record(std::string_view data) {
  const std::string length = raw_bytes(static_cast<std::uint64_t>(data.size()));
  return length + masked_crc(length) + std::string(data) + masked_crc(data);
}

std::string version_event(double seconds) {
  return field(kWallTime, seconds) + field(kFileVersion, std::string_view("brain.Event:2"));
}

std::string session_start_event(double seconds, std::int64_t step) {
  constexpr std::int64_t kStart = 1;  // SessionLog.status
  return field(kWallTime, seconds) + field(kStep, step) + field(kSessionLog, field(1, kStart));
}

std::string scalars_event(double seconds, std::int64_t step, const Scalars& scalars) {
  std::string summary;  // of Values: 1 tag, 2 simple_value
  for (const auto& [tag, value] : scalars)
    summary += field(1, field(1, std::string_view(tag)) + field(2, static_cast<float>(value)));
  return field(kWallTime, seconds) + field(kStep, step) + field(kSummary, summary);
}

Result<EventFile> EventFile::create(const fs::path& folder, std::int64_t first_step) {
  // TensorBoard reads a folder's files in the order of their names, and leaves one for good when a
  // next one is there: a new name must come after all others, also within one second.
  std::string last;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (is_event_file(it->path())) last = std::max(last, it->path().filename().string());
  auto seconds = static_cast<long long>(wall_seconds());
  std::string name;
  do {
    char text[64];
    std::snprintf(text, sizeof text, "%s%010lld.everlong", kEventsBegin.data(), seconds++);
    name = text;
  } while (name <= last);
  const fs::path path = folder / name;
  const int descriptor =
      ::open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor < 0) return io_error(path.string(), ": cannot create: ", std::strerror(errno));
  EventFile file(path, descriptor);
  std::string bytes = event_record(version_event(wall_seconds()));
  if (first_step >= 0) bytes += event_record(session_start_event(wall_seconds(), first_step));
  EVERLONG_RETURN_IF_ERROR(file.append(bytes));
  return file;
}

EventFile::EventFile(EventFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

EventFile::~EventFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Status EventFile::append(const std::string& bytes) {
  std::string_view left = bytes;
  while (!left.empty()) {
    const ::ssize_t written = ::write(descriptor_, left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return io_error(path_.string(), ": cannot write: ", std::strerror(errno));
    left.remove_prefix(static_cast<std::size_t>(written));
  }
  return {};
}

Status EventFile::add(std::int64_t step, const Scalars& scalars) {
  return append(event_record(scalars_event(wall_seconds(), step, scalars)));
}

Status EventFile::clear(const fs::path& folder) {
  std::vector<fs::path> all;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (is_event_file(it->path())) all.push_back(it->path());
  for (const auto& path : all) {
    fs::remove(path, error);
    if (error) return io_error(path.string(), ": cannot be removed: ", error.message());
  }
  return {};
}

}  // namespace everlong
