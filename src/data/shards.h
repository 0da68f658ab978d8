// One file of tokens with the places where its documents begin. Format: docs/formats.md, "Token
// shards".
#pragma once
#include <cstdint>
#include <span>

#include "core/files.h"

namespace everlong {

// 512 MiB of tokens: a shard is a file that copies, checks and maps in one go.
inline constexpr std::int64_t kMaxShardTokens = std::int64_t{1} << 28;

// Writes the whole shard at `path`, or nothing. document_starts: documents + 1 offsets into
// `tokens`, from 0, strictly rising, the last one the number of tokens.
Status write_shard(const fs::path& path, std::span<const std::uint16_t> tokens,
                   std::span<const std::uint64_t> document_starts);

// A mapped shard. Every size and offset is checked when it is opened, the bytes of the tokens only
// by verify(), which reads the whole file. Thread safe to read.
class Shard {
 public:
  static Result<Shard> open(const fs::path& path);

  std::span<const std::uint16_t> tokens() const { return tokens_; }
  // documents + 1 offsets into tokens().
  std::span<const std::uint64_t> document_starts() const { return document_starts_; }
  std::int64_t documents() const { return static_cast<std::int64_t>(document_starts_.size()) - 1; }
  const fs::path& path() const { return file_.path(); }

  // Takes a part of tokens() out of the process's memory; reading it again is as before.
  void release(std::span<const std::uint16_t> part) const { file_.release(std::as_bytes(part)); }

  // Compares the XXH3-64 checksum.
  Status verify() const;

 private:
  explicit Shard(MappedFile file) : file_(std::move(file)) {}
  Status read_layout();
  MappedFile file_;
  std::span<const std::uint16_t> tokens_;
  std::span<const std::uint64_t> document_starts_;
};

}  // namespace everlong
