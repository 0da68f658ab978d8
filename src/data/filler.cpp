#include "data/filler.h"

#include <algorithm>
#include <array>

#include "data/word_tokenizer.h"

namespace everlong {
namespace {

constexpr std::array<std::string_view, 5> kSentences = {"The grass is green.", "The sky is blue.",
                                                        "The sun is yellow.", "Here we go.",
                                                        "There and back again."};
constexpr std::array<FillerKind, 5> kKinds = {FillerKind::kSentences, FillerKind::kShuffled,
                                              FillerKind::kWords, FillerKind::kDigits,
                                              FillerKind::kText};
constexpr std::int64_t kWordsADigit = 4;  // one unit in so many is a digit (kDigits)

// A unit begins with the space that parts it from what came before.
Status add_unit(const Tokenizer& tokenizer, std::string_view text,
                std::vector<std::vector<std::int32_t>>& units) {
  units.push_back(tokenizer.encode(cat(" ", text)));
  if (!units.back().empty()) return {};
  return invalid_argument("tokenizer \"", tokenizer.name(), "\" gives \"", text,
                          "\" no token; no filler can be made with it");
}

}  // namespace

std::string_view name(FillerKind kind) {
  switch (kind) {
    case FillerKind::kSentences:
      return "sentences";
    case FillerKind::kShuffled:
      return "shuffled";
    case FillerKind::kWords:
      return "words";
    case FillerKind::kDigits:
      return "digits";
    case FillerKind::kText:
      break;
  }
  return "text";
}

Result<FillerKind> filler_kind(std::string_view given) {
  for (const FillerKind kind : kKinds)
    if (name(kind) == given) return kind;
  return invalid_argument("filler \"", given,
                          "\" is not known; allowed: sentences, shuffled, words, digits, text");
}

Result<Filler> Filler::make(FillerKind kind, const Tokenizer& tokenizer) {
  if (kind == FillerKind::kText)
    return invalid_argument("filler \"text\" needs a text; give one, or another kind of filler");
  Filler filler(kind);
  if (kind == FillerKind::kSentences || kind == FillerKind::kShuffled) {
    for (const auto sentence : kSentences)
      EVERLONG_RETURN_IF_ERROR(add_unit(tokenizer, sentence, filler.units_));
    return filler;
  }
  for (const auto word : plain_words())
    EVERLONG_RETURN_IF_ERROR(add_unit(tokenizer, word, filler.units_));
  if (kind == FillerKind::kDigits)
    for (char digit = '0'; digit <= '9'; ++digit)
      EVERLONG_RETURN_IF_ERROR(add_unit(tokenizer, std::string(1, digit), filler.digits_));
  return filler;
}

Result<Filler> Filler::from_text(TokenText text) {
  if (text.tokens < 1 || !text.read)
    return invalid_argument("the filler's text has ", text.tokens, " tokens; it needs at least 1");
  Filler filler(FillerKind::kText);
  filler.text_ = std::move(text);
  return filler;
}

const std::vector<std::int32_t>& Filler::Stretch::next_unit() {
  const auto pick = [&](const auto& units) -> const std::vector<std::int32_t>& {
    return units[static_cast<std::size_t>(random_.below(std::ssize(units)))];
  };
  if (filler_->kind_ == FillerKind::kSentences)
    return filler_->units_[static_cast<std::size_t>(drawn_++ % std::ssize(filler_->units_))];
  if (filler_->kind_ == FillerKind::kDigits && random_.below(kWordsADigit) == 0)
    return pick(filler_->digits_);
  return pick(filler_->units_);
}

Status Filler::Stretch::next(std::span<std::int32_t> out) {
  if (filler_->kind_ == FillerKind::kText) {
    const TokenText& text = filler_->text_;
    if (position_ < 0) position_ = random_.below(text.tokens);
    while (!out.empty()) {  // the text is a ring
      const auto count = std::min<std::int64_t>(std::ssize(out), text.tokens - position_);
      EVERLONG_RETURN_IF_ERROR(text.read(position_, out.first(static_cast<std::size_t>(count))));
      position_ = (position_ + count) % text.tokens;
      out = out.subspan(static_cast<std::size_t>(count));
    }
    return {};
  }
  while (!out.empty()) {
    if (rest_.empty()) rest_ = next_unit();
    const std::size_t count = std::min(rest_.size(), out.size());
    std::copy_n(rest_.begin(), count, out.begin());
    rest_ = rest_.subspan(count);
    out = out.subspan(count);
  }
  return {};
}

}  // namespace everlong
