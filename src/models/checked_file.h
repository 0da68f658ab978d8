// Tensors and texts in a safetensors file of our own that says its format and sums up all its
// bytes: streams and training checkpoints, where a damaged bit must not become a silent error.
#pragma once
#include <string>

#include "models/checkpoint.h"

namespace everlong {

// Adds `format` and `checksum` (XXH3-64 of everything else, docs/formats.md) to the metadata, which
// have neither. Written to a temporary, synced, renamed: a failure leaves what was there.
Status write_checked(const fs::path& path, const TensorFile& content, const std::string& format);

// Copies on the CPU. What differs anywhere from what was written is refused, as is another format;
// `kind` says for the message what the file should be: "a stream file". The metadata come without
// format and checksum.
Result<TensorFile> read_checked(const fs::path& path, const std::string& format,
                                std::string_view kind);

}  // namespace everlong
