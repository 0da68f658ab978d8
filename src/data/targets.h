// What is to be predicted after each token of a shard, where that is not simply the next token, and
// how much it counts. Format: docs/formats.md, "Targets".
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/safetensors.h"

namespace everlong {

inline constexpr std::int32_t kNoTarget = -100;  // what torch's cross-entropy ignores

// Writes the whole file at `path`, or nothing. Both spans have an element for each token of the
// shard; weights are finite and >= 0, targets kNoTarget or ids >= 0.
Status write_targets(const fs::path& path, std::span<const std::int32_t> targets,
                     std::span<const float> weights);

// A mapped file. Opening checks names, dtypes and sizes; reading checks what it hands out. Thread
// safe to read.
class TargetsFile {
 public:
  static Result<TargetsFile> open(const fs::path& path, std::int64_t tokens);
  // Copies from `position` on; both spans have one size, within the shard. Refuses ids outside the
  // vocabulary and weights that are negative or no numbers.
  Status read(std::int64_t position, std::int64_t vocab_size, std::span<std::int32_t> targets,
              std::span<float> weights) const;

 private:
  explicit TargetsFile(SafetensorsFile file) : file_(std::move(file)) {}
  SafetensorsFile file_;
};

}  // namespace everlong
