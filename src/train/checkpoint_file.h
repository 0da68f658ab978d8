// A training checkpoint as a file: docs/formats.md, "Training checkpoint". What is in it is
// Trainer's and the loop's business.
#pragma once
#include <string>

#include "models/checkpoint.h"

namespace everlong {

inline constexpr const char* kCheckpointFormat = "everlong-checkpoint-1";

// Adds format and checksum to the metadata. Written to a temporary, synced, renamed, the folder
// synced: a failure leaves what was there.
Status write_checkpoint(const fs::path& path, const TensorFile& content);

// Copies on the CPU. All bytes are checked first: what differs anywhere from what was written is
// refused. The metadata come without format and checksum.
Result<TensorFile> read_checkpoint(const fs::path& path);

// XXH3-64 of a text, 16 hexadecimal digits: for noticing that it is another one.
std::string short_hash(std::string_view text);

// One entry of the metadata; a checkpoint that lacks it is refused.
Result<std::string> metadata_entry(const TensorFile& content, const std::string& key);
// One that is a count, in plain decimal digits.
Result<std::int64_t> metadata_count(const TensorFile& content, const std::string& key);

}  // namespace everlong
