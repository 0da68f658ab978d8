// What is to be predicted after each token of a shard, where that is not simply the next token, how
// much it counts, and how often a memory is to store the token. Format: docs/formats.md, "Targets".
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/safetensors.h"

namespace everlong {

inline constexpr std::int32_t kNoTarget = -100;  // what torch's cross-entropy ignores

// Writes the whole file at `path`, or nothing. The spans have an element for each token of the
// shard; weights and writes are finite and >= 0, targets kNoTarget or ids >= 0. Empty writes: every
// token is stored once, and the file has none.
Status write_targets(const fs::path& path, std::span<const std::int32_t> targets,
                     std::span<const float> weights, std::span<const float> writes = {});

// A mapped file. Opening checks names, dtypes and sizes; reading checks what it hands out. Thread
// safe to read.
class TargetsFile {
 public:
  static Result<TargetsFile> open(const fs::path& path, std::int64_t tokens);
  // Copies from `position` on; both spans have one size, within the shard. Refuses ids outside the
  // vocabulary and weights that are negative or no numbers.
  Status read(std::int64_t position, std::int64_t vocab_size, std::span<std::int32_t> targets,
              std::span<float> weights) const;
  // Reads all of it: kCorrupt where it is not what was written (files of earlier versions cannot
  // tell).
  Status verify() const;
  bool has_writes() const;
  // The same for how often each token is stored; only where there are writes.
  Status read_writes(std::int64_t position, std::span<float> writes) const;

 private:
  explicit TargetsFile(SafetensorsFile file) : file_(std::move(file)) {}
  SafetensorsFile file_;
};

}  // namespace everlong
