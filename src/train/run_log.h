// log.jsonl of a run folder: docs/formats.md, "Run folder" and "Lines with checksums".
#pragma once
#include <nlohmann/json.hpp>

#include "train/checkpoint_store.h"

namespace everlong {

// The newest line is held back until the next one comes or the log is flushed, so that an
// evaluation can still join it. Not thread safe.
class RunLog {
 public:
  // An empty log in place of whatever was there.
  static Result<RunLog> create(const fs::path& path);
  // Goes on after `newest`, the newest of `lines` lines that a checkpoint knows of (null: none):
  // later lines are dropped. Lines that are damaged or missing are a note, no failure.
  static Result<RunLog> resume(const fs::path& path, const nlohmann::ordered_json& newest,
                               std::int64_t lines, const Note& note);
  RunLog(RunLog&& other) noexcept;
  RunLog& operator=(RunLog&&) = delete;
  ~RunLog();  // writes what is held back, as far as that goes

  Status add(nlohmann::ordered_json line);
  // Further members of the newest line; one that was already written is written again.
  Status amend(const nlohmann::ordered_json& members);
  Status flush();                                                   // in the system's hands
  Status sync();                                                    // on the disk
  const nlohmann::ordered_json& newest() const { return newest_; }  // null before the first
  std::int64_t lines() const { return lines_; }

 private:
  RunLog(fs::path path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  static Result<RunLog> open(const fs::path& path, bool empty);
  fs::path path_;
  int descriptor_;
  nlohmann::ordered_json newest_;
  bool written_ = true;               // newest_ is in the file
  std::int64_t begin_ = 0, end_ = 0;  // bytes: of the newest line in the file, and of the file
  std::int64_t lines_ = 0;
};

}  // namespace everlong
