// Regular expressions over UTF-8, as tokenizers use them: PCRE2 underneath.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "core/status.h"

namespace everlong {

// A compiled pattern. Immutable and thread safe.
//
// The patterns of tokenizer.json are written for Oniguruma. \s is the one construct in them that
// PCRE2 reads differently (it adds U+180E): it is replaced by Unicode's White_Space. Letters and
// numbers are those of PCRE2's Unicode version.
class Pattern {
 public:
  static Result<Pattern> compile(std::string_view expression);

  // Calls `piece(text, matched)` for every match and for everything between matches, in order;
  // pieces are never empty and make up the whole text. Bytes that are not UTF-8 match nothing.
  void split(std::string_view text,
             const std::function<void(std::string_view, bool matched)>& piece) const;

 private:
  explicit Pattern(std::shared_ptr<const void> code) : code_(std::move(code)) {}
  std::shared_ptr<const void> code_;
};

}  // namespace everlong
