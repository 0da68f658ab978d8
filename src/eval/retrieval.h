// Does a model find a fact again, how long ago and however deep it was said?
#pragma once
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "data/retrieval_task.h"
#include "eval/proportion.h"
#include "eval/text_reader.h"

namespace everlong {

struct RetrievalOptions {
  std::vector<std::int64_t> lengths = {1024, 4096, 16384};  // tokens of the prompt, exactly
  std::vector<double> depths = {0, 0.5, 1};
  std::int64_t prompts = 20;       // a cell
  std::int64_t jitter = 0;         // tokens that a fact moves by, either way
  std::int64_t length_jitter = 0;  // prompts are up to so many tokens shorter, each its own
  std::int64_t feed = 2048;  // tokens handed over at a time: all of a prompt that is in memory
  // The memory-off control reads only the last `local` tokens of the prompt, and at least the
  // question, into a fresh state: what a model knows without its memory.
  std::int64_t local = 0;
  bool control = true;
  std::uint64_t seed = 1;
};

// Answers are read teacher-forced: each token is predicted after the right ones before it. All of
// them right is the same as a greedy answer being right.
struct RetrievalScore {
  Proportion exact;   // prompts with every scored token right
  Proportion tokens;  // scored tokens; those of a prompt are not independent, so its interval is
                      // narrower than it should be

  void add(const RetrievalScore& other) {
    exact.add(other.exact);
    tokens.add(other.tokens);
  }
};

struct RetrievalCell {
  std::int64_t length = 0;
  double depth = 0;
  RetrievalScore score = {};
  RetrievalScore control = {};  // without trials when it was not asked for
  // Tokens from the end of the fact to the end of the prompt: least and most over the prompts.
  std::int64_t nearest = 0, farthest = 0;
  std::int64_t within_local = 0;  // prompts whose fact lies within the last `local` tokens
  std::int64_t state_bytes = 0;   // most at the end of a prompt
  double seconds = 0;
  // Each prompt: where its fact begins, and the answer's scored tokens that were right.
  struct Prompt {
    std::int64_t fact_begin = 0, right = 0, scored = 0;
  };
  std::vector<Prompt> prompts = {};
};

struct RetrievalReport {
  RetrievalTask task;
  FillerKind filler = FillerKind::kSentences;
  RetrievalOptions options;
  std::vector<RetrievalCell> cells;  // length by length, each with all depths
  std::int64_t tokens = 0;           // read in all
  double seconds = 0;

  RetrievalScore total() const;
  RetrievalScore total_control() const;
};

// Hears the tokens read so far and the score of all cells until then. A failure of it ends the
// measurement: that is how it is interrupted.
using RetrievalProgress = std::function<Status(std::int64_t tokens, const RetrievalScore& score)>;
// Tokens that retrieval() will have read in the end.
std::int64_t tokens_to_read(const RetrievalOptions& options);

// The prompt of a cell is a function of seed, length, depth and its number: other cells do not
// change it. Holds `feed` tokens of a prompt at a time.
Result<RetrievalReport> retrieval(TextReader& reader, const RetrievalPrompts& prompts,
                                  const RetrievalOptions& options,
                                  const RetrievalProgress& progress = {});

nlohmann::ordered_json to_json(const RetrievalReport& report);

}  // namespace everlong
