// Training a tokenizer of one's own: byte-level BPE, by the tokenizers package of Python.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/files.h"

namespace everlong {

struct TrainTokenizerOptions {
  std::int64_t vocab_size = 4096;  // with the 256 bytes and "<|endoftext|>": at least 257
  std::string python = "python3";  // a Python that has the package
};

struct TrainTokenizerReport {
  std::int64_t files = 0, bytes = 0, left_out = 0;  // of the text; files that are no text
  std::int64_t vocab_size = 0;                      // less than asked for where the text is small
};

// Reads the text files below `paths` (find_text_files()) and writes `out`, a tokenizer.json that
// read_tokenizer_json() has read. Pre-tokenizer: GPT-2's. Progress on stderr. kNotFound where there
// is no such Python, kUnsupported where it lacks the package; an existing `out` is replaced only
// when all went well.
Result<TrainTokenizerReport> train_tokenizer(const std::vector<fs::path>& paths,
                                             const fs::path& out,
                                             const TrainTokenizerOptions& options);

}  // namespace everlong
