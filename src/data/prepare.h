// Text files to a dataset folder: find, cut into documents, drop duplicates, split, encode, write.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include "data/dataset.h"
#include "data/documents.h"

namespace everlong {

struct PrepareOptions {
  std::string tokenizer = "bytes";
  // Part of the documents that is held out, 0 <= f < 1; 0: none. A document's own text decides, so
  // it does not change sides when others come or go. With two documents or more neither side is
  // empty.
  double valid_fraction = 0.1;
  bool all_files = false;  // also files whose ending does not say that they are text
  bool force = false;      // write into a folder that holds other things
  std::int64_t max_document_bytes = std::int64_t{4} << 20;
  std::int64_t shard_tokens = std::int64_t{1} << 26;
  // 2 or more: a landmark (Landmark Attention; its id is the tokenizer's vocabulary) closes every
  // block of so many tokens of a document. Never predicted, as models with landmark_predicted =
  // false need it; or predicted like any token, and asked for the next one.
  std::int64_t landmark_block = 0;
  bool landmark_predicted = false;
};

struct PrepareReport {
  std::int64_t files = 0;                 // read
  SkipCounts skipped;                     // files left out, by reason
  std::int64_t duplicates = 0;            // documents whose text had come before
  std::int64_t documents = 0, bytes = 0;  // kept
  DatasetInfo dataset;
};
nlohmann::json to_json(const PrepareReport& report);

// Reads everything twice (find and hash, then encode) and holds one shard of each split in memory.
// A dataset that is in `out` already is replaced at the end in one go; a folder with anything else
// in it is refused without `force`. Draws progress on stderr.
Result<PrepareReport> prepare(const std::vector<fs::path>& paths, const fs::path& out,
                              const PrepareOptions& options);

}  // namespace everlong
