// Prompts that hide facts in filler and ask for them at the end, of an exact number of tokens.
//
//   passkey   "The pass key is 40173. Remember it. ..."                       (2305.16300)
//   single    "The magic number of owl is 40173."                             (RULER, 2404.06654)
//   multikey  the same of several labels; one of them is asked for
//   multivalue  several numbers of one label; all are asked for, in their order
//   tracking  "VAR C = 40173."  "VAR A = VAR C."  ...: which variables hold 40173?
//
// A prompt is intro, filler with the facts in it, question. The answer follows and is not part of
// it. Everything is a function of the settings and the seed.
#pragma once
#include "data/filler.h"

namespace everlong {

enum class RetrievalKind { kPasskey, kSingle, kMultiKey, kMultiValue, kTracking };
Result<RetrievalKind> retrieval_kind(std::string_view name);
std::string_view name(RetrievalKind kind);

struct RetrievalTask {
  RetrievalKind kind = RetrievalKind::kPasskey;
  std::int64_t digits = 5;   // of a number, each uniform: the chance of one is 10 %
  std::int64_t needles = 4;  // multikey: labels with a number, 1 to 16; multivalue: numbers
  std::int64_t hops = 4;     // tracking: assignments after the first; hops + 1 variables a chain
  std::int64_t chains = 1;   // tracking: one is asked for, the others distract
};
// Refuses sizes that no prompt can have (labels and variables run out).
Status validate(const RetrievalTask& task);

struct PromptPlace {
  std::int64_t tokens = 0;  // of the whole prompt, question included
  double depth = 0;  // of the asked fact: 0 right after the intro, 1 right before the question
  std::int64_t jitter = 0;  // the fact moves by up to so many tokens either way, within the filler
};

struct RetrievalPrompt {
  // `filler` tokens, then these.
  struct Piece {
    std::int64_t filler = 0;
    std::vector<std::int32_t> tokens = {};
  };
  std::vector<Piece> pieces;  // the last one is the question
  std::vector<std::int32_t> answer = {};
  std::vector<std::uint8_t> scored = {};  // [answer]: 0 for what only parts one part from the next
  std::int64_t tokens = 0;
  // Where the asked fact lies (of several: the first), in tokens of the prompt.
  std::int64_t fact_begin = 0, fact_end = 0;
  std::uint64_t filler_seed = 0;

  std::int64_t question_tokens() const { return std::ssize(pieces.back().tokens); }
};

// Makes prompts of one task. The filler outlives it. Thread safe.
class RetrievalPrompts {
 public:
  static Result<RetrievalPrompts> make(const RetrievalTask& task, const Tokenizer& tokenizer,
                                       const Filler& filler);
  // Refused where the place has not room for intro, facts and question; the message says how much
  // they need. No number of the answer occurs (as its tokens) in the prompt beyond the facts: where
  // the filler holds it by chance, numbers and filler are drawn anew.
  Result<RetrievalPrompt> prompt(const PromptPlace& place, std::uint64_t seed) const;
  // Tokens of intro, facts and question, the shortest prompt there is, and of the answer. With the
  // tokenizers words and bytes all prompts of a task agree; with others these are of one drawn.
  std::int64_t least_tokens() const { return least_tokens_; }
  std::int64_t answer_tokens() const { return answer_tokens_; }
  const RetrievalTask& task() const { return task_; }
  const Filler& filler() const { return *filler_; }

 private:
  struct Draft;
  RetrievalPrompts(const RetrievalTask& task, const Tokenizer& tokenizer, const Filler& filler)
      : task_(task), tokenizer_(&tokenizer), filler_(&filler) {}
  Draft draft(Random& random) const;
  void add_answer(const Draft& draft, RetrievalPrompt& prompt) const;
  Result<RetrievalPrompt> lay_out(const Draft& draft, const PromptPlace& place,
                                  Random& random) const;
  RetrievalTask task_;
  const Tokenizer* tokenizer_;
  const Filler* filler_;
  std::int64_t least_tokens_ = 0, answer_tokens_ = 0;
};

// The tokens of a prompt, in order, in any pieces: memory does not grow with the prompt. Not thread
// safe; prompt and filler outlive it.
class PromptReader {
 public:
  PromptReader(const RetrievalPrompt& prompt, const Filler& filler);
  // Fills at most all of `out`; returns how many: fewer only at the end.
  Result<std::int64_t> next(std::span<std::int32_t> out);

 private:
  const RetrievalPrompt* prompt_;
  const Filler* filler_;
  std::size_t piece_ = 0;
  std::int64_t done_ = 0;  // tokens of this piece
  Filler::Stretch stretch_;
};

// How often `part` occurs in the whole prompt, overlapping occurrences counted.
Result<std::int64_t> occurrences(const RetrievalPrompt& prompt, const Filler& filler,
                                 std::span<const std::int32_t> part);

}  // namespace everlong
