#include "train/run_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/json_lines.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t kMostResumedBytes = std::size_t{4} << 30;

Status log_failed(const fs::path& path, std::string_view what) {
  return io_error(path.string(), ": cannot ", what, " the log: ", std::strerror(errno));
}

// The step of a line; -1 where it has none.
std::int64_t step_of_line(const ordered_json& line) {
  const auto found = line.find("step");
  return found != line.end() && found->is_number_integer() ? found->get<std::int64_t>() : -1;
}

}  // namespace

Result<RunLog> RunLog::open(const fs::path& path, bool empty) {
  const int descriptor =
      ::open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC | (empty ? O_TRUNC : 0), 0644);
  if (descriptor < 0) return log_failed(path, "open");
  RunLog log(path, descriptor);
  log.end_ = log.begin_ = ::lseek(descriptor, 0, SEEK_END);
  return log;
}

Result<RunLog> RunLog::create(const fs::path& path) { return open(path, true); }

Result<RunLog> RunLog::resume(const fs::path& path, const ordered_json& newest, std::int64_t lines,
                              const Note& note) {
  JsonLines found;
  if (const auto text = read_file(path, kMostResumedBytes); text.ok())
    found = parse_json_lines(*text);
  else if (text.status().code() != StatusCode::kNotFound)
    return text.status();
  std::string kept;
  std::int64_t count = 0, last = -1;
  for (const auto& line : found.lines) {
    const std::int64_t step = step_of_line(line);
    if (newest.is_null() || step <= last || step >= step_of_line(newest)) continue;
    last = step;
    ++count;
    kept += checked_json_line(line);
  }
  if (!newest.is_null()) ++count;
  if (count < lines && note)
    note(cat(path.string(), ": lacks ", lines - count, " of ", lines,
             " lines; the run itself is not touched by that"));
  EVERLONG_RETURN_IF_ERROR(write_file(path, kept));
  EVERLONG_ASSIGN(auto log, open(path, false));
  log.newest_ = newest;
  log.written_ = newest.is_null();
  log.lines_ = count;
  return log;
}

RunLog::RunLog(RunLog&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      newest_(std::move(other.newest_)),
      written_(std::exchange(other.written_, true)),
      begin_(other.begin_),
      end_(other.end_),
      lines_(other.lines_) {}

RunLog::~RunLog() {
  if (descriptor_ < 0) return;
  (void)flush();
  ::close(descriptor_);
}

Status RunLog::add(ordered_json line) {
  EVERLONG_RETURN_IF_ERROR(flush());
  newest_ = std::move(line);
  written_ = false;
  ++lines_;
  return {};
}

Status RunLog::amend(const ordered_json& members) {
  if (newest_.is_null()) return {};
  if (written_) {
    if (::ftruncate(descriptor_, begin_) != 0) return log_failed(path_, "shorten");
    end_ = begin_;
    written_ = false;
  }
  newest_.update(members);
  return {};
}

Status RunLog::flush() {
  if (written_) return {};
  const std::string line = checked_json_line(newest_);
  begin_ = end_;
  std::string_view left = line;
  while (!left.empty()) {
    const ::ssize_t bytes = ::pwrite(descriptor_, left.data(), left.size(), end_);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) {
      end_ = begin_;  // the line is written again, whole, when there is room
      return log_failed(path_, "write");
    }
    left.remove_prefix(static_cast<std::size_t>(bytes));
    end_ += bytes;
  }
  written_ = true;
  return {};
}

Status RunLog::sync() {
  EVERLONG_RETURN_IF_ERROR(flush());
  return ::fdatasync(descriptor_) == 0 ? Status() : log_failed(path_, "sync");
}

}  // namespace everlong
