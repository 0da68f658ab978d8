// The text that a needle is hidden in: any number of tokens, made or read as they are asked for.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "core/random.h"
#include "data/tokenizer.h"

namespace everlong {

enum class FillerKind {
  kSentences,  // the five sentences of the passkey test (2305.16300), over and over
  kShuffled,   // the same sentences in random order
  kWords,      // random words
  kDigits,     // random words and, one in four, random digits: what a number can be mistaken for
  kText,       // a text of the user, from a place of its own in every stretch
};
// "sentences", "shuffled", "words", "digits" or "text".
Result<FillerKind> filler_kind(std::string_view name);
std::string_view name(FillerKind kind);

// A text as tokens, at random access.
struct TokenText {
  std::int64_t tokens = 0;
  // Copies [position, position + out.size()), which lies within `tokens`.
  std::function<Status(std::int64_t position, std::span<std::int32_t> out)> read;
};

// Immutable and thread safe (as far as the text's `read` is).
class Filler {
 public:
  // Any kind but kText. Refuses a tokenizer that gives one of the words no token at all.
  static Result<Filler> make(FillerKind kind, const Tokenizer& tokenizer);
  static Result<Filler> from_text(TokenText text);

  FillerKind kind() const { return kind_; }
  // Numbers can only occur in the filler by chance where it has digits.
  bool may_hold_digits() const {
    return kind_ == FillerKind::kDigits || kind_ == FillerKind::kText;
  }

  // A stretch of filler: the tokens are a function of kind, text and seed alone, however they are
  // cut into calls. Not thread safe; the filler outlives it.
  class Stretch {
   public:
    Status next(std::span<std::int32_t> out);

   private:
    friend class Filler;
    Stretch(const Filler& filler, std::uint64_t seed) : filler_(&filler), random_{seed} {}
    const std::vector<std::int32_t>& next_unit();
    const Filler* filler_;
    Random random_;
    std::int64_t drawn_ = 0;                   // units
    std::int64_t position_ = -1;               // in the text
    std::span<const std::int32_t> rest_ = {};  // of the unit begun
  };
  Stretch stretch(std::uint64_t seed) const { return {*this, seed}; }

 private:
  explicit Filler(FillerKind kind) : kind_(kind) {}
  FillerKind kind_;
  std::vector<std::vector<std::int32_t>> units_;   // sentences or words
  std::vector<std::vector<std::int32_t>> digits_;  // " 0" to " 9", for kDigits
  TokenText text_;
};

}  // namespace everlong
