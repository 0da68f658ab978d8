// The checkpoints of a run folder: the newest few, and the newest that can be read.
#pragma once
#include <functional>
#include <optional>
#include <vector>

#include "train/checkpoint_file.h"

namespace everlong {

// What a person should know and no program needs: goes to stderr.
using Note = std::function<void(const std::string& line)>;

// Of one writer (FolderLock). Not thread safe.
class CheckpointStore {
 public:
  // `keep`: how many stay, at least 1. The folder is made by the first save.
  CheckpointStore(fs::path folder, std::int64_t keep) : folder_(std::move(folder)), keep_(keep) {}

  // Checkpoints by their names, newest first. None where there is no folder.
  std::vector<fs::path> files() const;
  bool empty() const { return files().empty(); }

  // Once the new one is safe, those before the newest `keep` go, also by a later `keep` of fewer.
  Status save(std::int64_t step, const TensorFile& content);
  const fs::path& last_saved() const { return last_saved_; }  // empty before the first save

  struct Found {
    fs::path path;
    TensorFile content;
  };
  // The newest that can be read, or nothing where there are none. Those that are damaged are
  // renamed, each with a note; where all are, that is a failure: a run is not begun anew by
  // accident.
  Result<std::optional<Found>> newest(const Note& note);
  // Whether the newest says that its run has come to its end; false where it cannot be read.
  bool finished() const;

  // Removes all checkpoints, oldest first, so that what a kill leaves is as new as can be.
  Status clear();
  void set_keep(std::int64_t keep) { keep_ = keep; }

 private:
  void remove_leftovers() const;  // temporaries of killed programs
  fs::path folder_, last_saved_;
  std::int64_t keep_;
};

}  // namespace everlong
