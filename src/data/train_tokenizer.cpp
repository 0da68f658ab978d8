#include "data/train_tokenizer.h"

#include <unistd.h>

#include <nlohmann/json.hpp>

#include "core/process.h"
#include "core/progress.h"
#include "data/documents.h"
#include "data/tokenizer_json.h"
#include "embedded/train_tokenizer.py.h"

namespace everlong {
namespace {

constexpr std::int64_t kSmallestTrained = 257, kLargestTrained = 1 << 20;
constexpr const char* kTokenizersPackage =
    "tokenizers==0.23.3";      // the version that the tests compare with
constexpr int kNoPackage = 3;  // train_tokenizer.py

// What the program prints: lines "read BYTES", then the tokenizer.
struct TrainerOutput {
  Progress progress;
  std::string line, tokenizer;

  Status take(std::string_view piece) {
    for (const char c : piece) {
      if (c != '\n') {
        line += c;
        continue;
      }
      if (const auto bytes = line.starts_with("read ") ? parse_count(line.substr(5)) : std::nullopt)
        progress.update(*bytes);
      else
        tokenizer = line + "\n";
      line.clear();
    }
    return {};
  }
};

}  // namespace

Result<TrainTokenizerReport> train_tokenizer(const std::vector<fs::path>& paths,
                                             const fs::path& out,
                                             const TrainTokenizerOptions& options) {
  if (options.vocab_size < kSmallestTrained || options.vocab_size > kLargestTrained)
    return invalid_argument("a vocabulary of ", options.vocab_size, "; from ", kSmallestTrained,
                            " (256 bytes and the end of document) to ", kLargestTrained);
  SkipCounts skipped;
  EVERLONG_ASSIGN(const auto files, find_text_files(paths, {}, skipped));
  TrainTokenizerReport report;
  nlohmann::json task = {{"files", nlohmann::json::array()}, {"vocab_size", options.vocab_size}};
  for (const TextFile& file : files) {
    task["files"].push_back(file.path.string());
    report.bytes += file.bytes;
    ++report.files;
  }
  for (const auto& [reason, count] : skipped) report.left_out += count;
  if (report.bytes == 0)
    return invalid_argument(paths.front().string(), ": there is no text here to learn from");

  TrainerOutput reader{Progress("read", report.bytes, "bytes"), {}, {}};
  const std::string input = task.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const auto ran =
      run_process({.command = {options.python, "-c", std::string(kTrainTokenizer)},
                   .environment = {{"PYTHONIOENCODING", "utf-8"}},
                   .input = input,
                   .output = [&](std::string_view piece) { return reader.take(piece); }});
  reader.progress.finish();
  if (!ran.ok() && ran.status().code() == StatusCode::kNotFound)
    return not_found("there is no program \"", options.python,
                     "\"; name a Python that has the package tokenizers: --python PROGRAM");
  if (!ran.ok()) return ran.status();
  if (ran->exit_code == kNoPackage)
    return unsupported(
        "\"", options.python,
        "\" has no package tokenizers, which trains the vocabulary. Install it: ", options.python,
        " -m pip install ", kTokenizersPackage, "; or name a Python that has it: --python PROGRAM");
  if (ran->exit_code != 0) return io_error("training the tokenizer failed: ", ran->errors);

  fs::path part = out;
  part += cat(".part.", ::getpid());
  const auto written = [&]() -> Status {
    EVERLONG_RETURN_IF_ERROR(write_file(part, reader.tokenizer));
    EVERLONG_ASSIGN(const auto made, read_tokenizer_json(part));
    report.vocab_size = made->vocab_size();
    return rename_file(part, out);
  }();
  if (!written.ok()) {
    std::error_code ignored;
    fs::remove(part, ignored);
    return written;
  }
  return report;
}

}  // namespace everlong
