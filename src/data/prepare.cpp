#include "data/prepare.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "core/progress.h"
#include "data/install.h"
#include "data/landmarks.h"
#include "data/staging.h"
#include "data/targets.h"
#include "data/tokenizer.h"

namespace everlong {
namespace {

struct Document {
  std::size_t file;
  std::int64_t offset, bytes;
  std::uint64_t low, high;  // XXH3-128 of the text
  bool valid = false;
};

// The hash as a number in [0, 1).
double share(const Document& document) { return static_cast<double>(document.low >> 11) * 0x1p-53; }

Status check(const PrepareOptions& options) {
  if (!(options.valid_fraction >= 0 && options.valid_fraction < 1))
    return invalid_argument("valid_fraction = ", options.valid_fraction,
                            " is out of range; allowed: 0 <= f < 1");
  if (options.max_document_bytes < 64 || options.max_document_bytes >= kMaxShardTokens)
    return invalid_argument("max_document_bytes = ", options.max_document_bytes,
                            " is out of range; allowed: 64 to ", kMaxShardTokens - 1);
  if (options.shard_tokens < 1 || options.shard_tokens > kMaxShardTokens)
    return invalid_argument("shard_tokens = ", options.shard_tokens,
                            " is out of range; allowed: 1 to ", kMaxShardTokens);
  if (options.landmark_block != 0 &&
      (options.landmark_block < 2 || options.landmark_block > kMaxShardTokens))
    return invalid_argument("landmark_block = ", options.landmark_block,
                            " is out of range; allowed: 2 to ", kMaxShardTokens,
                            ", or 0 for no landmarks");
  if (options.landmark_predicted && options.landmark_block == 0)
    return invalid_argument("landmark_predicted needs landmark_block: there are no landmarks");
  return {};
}

std::string counts(const SkipCounts& skipped) {
  std::vector<std::string> parts;
  for (const auto& [reason, files] : skipped) parts.push_back(cat(files, " ", reason));
  return join(parts, ", ");
}

Result<std::vector<Document>> find_documents(const std::vector<TextFile>& files,
                                             const PrepareOptions& options, PrepareReport& report) {
  std::vector<Document> documents;
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen;
  std::int64_t total = 0, done = 0;
  for (const auto& file : files) total += file.bytes;
  Progress progress("reading", total, "B");
  std::string text;
  for (std::size_t i = 0; i < files.size(); ++i) {
    EVERLONG_ASSIGN(auto reader, DocumentReader::open(files[i].path, options.max_document_bytes));
    for (;;) {
      Document document{i, 0, 0, 0, 0};
      EVERLONG_ASSIGN(const bool more, reader.next(text, document.offset));
      if (!more) break;
      document.bytes = static_cast<std::int64_t>(text.size());
      const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
      document.low = hash.low64;
      document.high = hash.high64;
      if (seen.emplace(document.low, document.high).second) {
        documents.push_back(document);
        report.bytes += document.bytes;
      } else {
        ++report.duplicates;
      }
      done += document.bytes;
      progress.update(done);
    }
  }
  return documents;
}

void split(std::vector<Document>& documents, double valid_fraction) {
  for (auto& document : documents) document.valid = share(document) < valid_fraction;
  if (documents.size() < 2 || valid_fraction == 0) {
    for (auto& document : documents) document.valid = false;
    return;
  }
  const auto valid =
      std::count_if(documents.begin(), documents.end(), [](const auto& d) { return d.valid; });
  const auto by_hash = [](const auto& a, const auto& b) {
    return std::pair(a.low, a.high) < std::pair(b.low, b.high);
  };
  if (valid == 0) std::min_element(documents.begin(), documents.end(), by_hash)->valid = true;
  if (valid == static_cast<std::ptrdiff_t>(documents.size()))
    std::max_element(documents.begin(), documents.end(), by_hash)->valid = false;
}

// Adds a document, landmarks and all.
Status add_document(SplitWriter& split, const std::vector<std::int32_t>& ids, std::int64_t bytes,
                    const PrepareOptions& options, std::int32_t landmark) {
  if (options.landmark_block == 0) return split.add(ids, bytes);
  if (options.landmark_predicted) {
    std::vector<std::int32_t> marked;
    LandmarkInserter(options.landmark_block, landmark, true).insert(ids, marked);
    if (marked.back() == landmark) marked.pop_back();  // nothing comes after it
    return split.add(marked, bytes);
  }
  LabelledText text{ids, {ids.begin() + 1, ids.end()}, std::vector<float>(ids.size(), 1)};
  text.targets.push_back(kNoTarget);
  text.weights.back() = 0;
  const LabelledText marked = with_landmarks(text, options.landmark_block, landmark);
  return split.add(marked.ids, bytes, marked.targets, marked.weights);
}

Status write_documents(const std::vector<TextFile>& files, const std::vector<Document>& documents,
                       const Tokenizer& tokenizer, const fs::path& folder,
                       const PrepareOptions& options, PrepareReport& report) {
  SplitWriter train(folder, "train", options.shard_tokens),
      valid(folder, "valid", options.shard_tokens);
  const auto landmark = static_cast<std::int32_t>(tokenizer.vocab_size());
  Progress progress("writing", report.bytes, "B");
  std::vector<std::int32_t> ids;
  std::int64_t done = 0;
  for (const Document& document : documents) {
    const fs::path& path = files[document.file].path;
    EVERLONG_ASSIGN(const std::string text, read_part(path, document.offset, document.bytes));
    const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
    if (hash.low64 != document.low || hash.high64 != document.high)
      return io_error(path.string(), ": changed while it was being prepared; run it again");
    ids.clear();
    tokenizer.encode(text, ids);
    ids.push_back(tokenizer.eod());
    EVERLONG_RETURN_IF_ERROR(
        add_document(document.valid ? valid : train, ids, document.bytes, options, landmark)
            .at(path.string()));
    done += document.bytes;
    progress.update(done);
  }
  EVERLONG_ASSIGN(report.dataset.splits["train"], train.finish());
  EVERLONG_ASSIGN(report.dataset.splits["valid"], valid.finish());
  return {};
}

}  // namespace

nlohmann::json to_json(const PrepareReport& report) {
  nlohmann::json splits = nlohmann::json::object();
  for (const auto& [name, info] : report.dataset.splits)
    splits[name] = {{"tokens", info.tokens},
                    {"documents", info.documents},
                    {"bytes", info.bytes},
                    {"shards", info.shards.size()}};
  return {{"files", report.files},
          {"skipped", report.skipped},
          {"duplicates", report.duplicates},
          {"documents", report.documents},
          {"bytes", report.bytes},
          {"tokenizer", report.dataset.tokenizer},
          {"vocab_size", report.dataset.vocab_size},
          {"splits", splits}};
}

Result<PrepareReport> prepare(const std::vector<fs::path>& paths, const fs::path& out,
                              const PrepareOptions& options) {
  EVERLONG_RETURN_IF_ERROR(check(options));
  EVERLONG_ASSIGN(const auto tokenizer, make_tokenizer(options.tokenizer));
  if (tokenizer->eod() < 0)
    return invalid_argument(options.tokenizer, ": no token of it ends a document; name one in ",
                            "tokenizer_config.json beside it, as eos_token");
  if (paths.empty()) return invalid_argument("no text given; name files or folders");
  if (out.empty()) return invalid_argument("no output folder given");
  EVERLONG_RETURN_IF_ERROR(check_dataset_target(out, options.force));

  PrepareReport report;
  EVERLONG_ASSIGN(const auto files,
                  find_text_files(paths, {options.all_files, out}, report.skipped));
  if (files.empty()) {
    std::vector<std::string> given;
    for (const auto& path : paths) given.push_back(path.string());
    return not_found(
        join(given, ", "), ": no text found",
        report.skipped.empty() ? "" : cat(" (left out: ", counts(report.skipped), ")"),
        options.all_files ? "" : "; --all-files also takes text files with other endings");
  }
  report.files = static_cast<std::int64_t>(files.size());
  EVERLONG_ASSIGN(auto documents, find_documents(files, options, report));
  report.documents = static_cast<std::int64_t>(documents.size());
  split(documents, options.valid_fraction);

  const bool made_here = !fs::exists(out);
  const auto written = [&]() -> Status {
    EVERLONG_ASSIGN(const auto staging, StagingFolder::create(out, "prepare"));
    report.dataset = {std::string(tokenizer->name()),
                      tokenizer->vocab_size() + (options.landmark_block > 0 ? 1 : 0),
                      tokenizer->eod(),
                      options.valid_fraction,
                      {}};
    EVERLONG_RETURN_IF_ERROR(
        write_documents(files, documents, *tokenizer, staging.path(), options, report));
    if (tokenizer->name().starts_with("tokenizer."))
      EVERLONG_RETURN_IF_ERROR(copy_tokenizer_files(options.tokenizer, out));
    return install_dataset(staging.path(), out, report.dataset);
  }();
  if (!written.ok()) {
    std::error_code ignored;
    if (made_here) fs::remove(out, ignored);  // only when nothing is in it
    return written;
  }
  return report;
}

}  // namespace everlong
