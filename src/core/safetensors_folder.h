// The tensors of a folder: one safetensors file, or several (shards) with an index.
//
// The index, "<stem>.safetensors.index.json", is
//   {"metadata": {"total_size": bytes}, "weight_map": {"tensor": "shard file", ...}}
// as Hugging Face writes it. docs/formats.md.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/safetensors.h"

namespace everlong {

// Opened and checked without reading tensors: of each file only the header. A folder may be larger
// than memory: read a tensor, release() its bytes, go on. Thread safe to read.
class SafetensorsFolder {
 public:
  // Reads model.safetensors.index.json with its shards; where there is none, model.safetensors.
  // kNotFound where there is neither. Refused: a shard that is missing or broken, a tensor that is
  // in two shards, and any difference between what the index says and what the shards hold.
  static Result<SafetensorsFolder> open(const fs::path& folder);

  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }
  // Of the file, or of the first shard.
  const std::map<std::string, std::string>& metadata() const { return files_.front().metadata(); }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  // Of every file; see SafetensorsFile.
  bool has_checksums() const;
  Status verify(const std::string& name) const { return files_[file_of_.at(name)].verify(name); }
  // The file that says what the folder holds: for messages.
  const fs::path& place() const { return place_; }
  // Frees the memory that reading `bytes` of this tensor (one of tensors()) took.
  void release(const std::string& name, std::span<const std::byte> bytes) const {
    files_[file_of_.at(name)].release(bytes);
  }

 private:
  fs::path place_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, TensorEntry> tensors_;  // into files_
  std::map<std::string, std::size_t> file_of_;  // by tensor
};

inline constexpr std::int64_t kDefaultShardBytes = 5'000'000'000;  // as Hugging Face

// Replaces the weights of a folder by `tensors`, in this order: model.safetensors where they fit in
// `max_shard_bytes`, else shards of at most that (a larger tensor has a shard of its own) and their
// index. `bytes_of` as in write_safetensors.
//
// Whatever ends the program on the way, the folder holds all of the old weights or all of the new
// ones: files are written under names that the folder does not have yet, and one rename (of
// model.safetensors or of the index) or one removal (of an index that is no longer needed) makes
// the new weights the folder's. Files that nothing names any more go last; those that a killed
// program left go with them. `before_commit`, if given, runs when all is written, just before that
// step; its failure stops the write.
Status write_safetensors_folder(const fs::path& folder, const std::vector<TensorPlan>& tensors,
                                const std::map<std::string, std::string>& metadata,
                                std::int64_t max_shard_bytes, const TensorBytes& bytes_of,
                                const std::function<Status()>& before_commit = {});

}  // namespace everlong
