// How far back does a model still know a symbol that it saw once? The task `recall` of
// data/synthetic.h, measured question by question.
#pragma once
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "data/synthetic.h"
#include "eval/proportion.h"
#include "eval/text_reader.h"

namespace everlong {

struct RecallOptions {
  std::vector<std::int64_t> lengths = {256, 1024, 4096};  // tokens of a document
  RecallTask task = {};
  std::int64_t documents = 100;  // of each length
  std::int64_t chunk =
      0;  // group questions by how many chunks of so many tokens lie between; 0: not
  std::int64_t modulus = 0;  // group them by their distance modulo so many tokens; 0: not
  std::uint64_t seed = 1;
  // For a symbol's place and a length: through how many layers it must pass to come to each
  // position, -1 where it cannot (AttentionReach::layers_from). Absent: nothing is predicted.
  std::function<std::vector<std::int64_t>(std::int64_t place, std::int64_t tokens)> layers_from =
      {};
};

struct RecallGroup {
  std::int64_t begin = 0, end = 0;  // distances [begin, end), chunks apart, residues or layers
  Proportion right;
  std::int64_t connected = 0;  // questions that the symbol can come to
};

struct RecallRow {
  std::int64_t length = 0;
  // Questions of one document share one symbol: those of a group are not independent, and the
  // intervals are narrower than they should be.
  Proportion right;
  std::vector<RecallGroup> distances;  // 1-1, 2-3, 4-7, ... tokens from the symbol to the question
  std::vector<RecallGroup> chunks;     // 0 (the same chunk), 1, 2, ... chunks apart
  std::vector<RecallGroup> residues;   // of the distance
  std::vector<RecallGroup> layers;     // that the symbol must pass to come there; -1: it cannot
  std::int64_t connected = 0;
};

// What the arithmetic allows of so many questions: those that the symbol comes to, and of the
// others one in `symbols` by guessing.
double predicted_share(std::int64_t connected, std::int64_t questions, std::int64_t symbols);

struct RecallReport {
  RecallOptions options;
  std::vector<RecallRow> rows;
  double seconds = 0;
};

// Hears the documents read. A failure of it ends the measurement.
using RecallProgress = std::function<Status(std::int64_t documents)>;

// Each document is read into a fresh state, in pieces that end at its questions. No document is one
// that write_synthetic() writes.
Result<RecallReport> recall(TextReader& reader, const Tokenizer& tokenizer,
                            const RecallOptions& options, const RecallProgress& progress = {});

nlohmann::ordered_json to_json(const RecallReport& report);

}  // namespace everlong
