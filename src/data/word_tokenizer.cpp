#include "data/word_tokenizer.h"

#include <array>
#include <map>

namespace everlong {
namespace {

using Words = std::span<const std::string_view>;

constexpr std::array<std::string_view, 10> kDigits = {"0", "1", "2", "3", "4",
                                                      "5", "6", "7", "8", "9"};
constexpr std::array<std::string_view, 5> kMarks = {".", ",", "?", "=", "_"};
constexpr std::array<std::string_view, 21> kPlain = {
    "there", "is",  "important", "info", "hidden", "here",  "find",
    "it",    "and", "memorize",  "the",  "grass",  "green", "sky",
    "blue",  "sun", "yellow",    "we",   "go",     "back",  "again"};
constexpr std::array<std::string_view, 14> kTask = {
    "pass", "key", "remember", "what", "magic", "number",    "numbers",
    "of",   "are", "they",     "var",  "which", "variables", "hold"};
constexpr std::array<std::string_view, 16> kLabels = {"fox", "owl", "elk", "bee", "hen", "cat",
                                                      "dog", "cow", "ant", "bat", "eel", "ram",
                                                      "yak", "pig", "emu", "cod"};
constexpr std::array<std::string_view, 16> kLetters = {"a", "b", "c", "d", "e", "f", "g", "h",
                                                       "i", "j", "k", "l", "m", "n", "o", "p"};
constexpr std::int32_t kEndOfDocument = 0, kBeginOfDocument = 1, kPad = 2, kUnknown = 3, kFirst = 4;

// ASCII only: letters of other scripts belong to words that the list does not have.
bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
}

class WordTokenizer : public Tokenizer {
 public:
  WordTokenizer() {
    for (const Words words : {Words(kDigits), Words(kMarks), Words(kPlain), Words(kTask),
                              Words(kLabels), Words(kLetters)})
      for (const std::string_view word : words) {
        ids_.emplace(word, kFirst + static_cast<std::int32_t>(words_.size()));
        words_.push_back(word);
      }
  }

  std::string_view name() const override { return "words"; }
  std::int64_t vocab_size() const override { return kFirst + std::ssize(words_); }
  std::int32_t eod() const override { return kEndOfDocument; }
  std::int32_t bod() const override { return kBeginOfDocument; }
  std::int32_t pad() const override { return kPad; }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override {
    std::string word;
    for (std::size_t i = 0; i < text.size();) {
      if (is_space(text[i])) {
        ++i;
        continue;
      }
      // A run of letters is one word; a digit or mark stands alone.
      std::size_t end = i + 1;
      if (is_letter(text[i]))
        while (end < text.size() && is_letter(text[end])) ++end;
      word.assign(text.substr(i, end - i));
      for (char& c : word)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
      const auto found = ids_.find(word);
      ids.push_back(found == ids_.end() ? kUnknown : found->second);
      i = end;
    }
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    for (const std::int32_t id : ids) {
      if (id != kUnknown && (id < kFirst || id >= vocab_size())) continue;
      if (!text.empty()) text += ' ';
      text += id == kUnknown ? std::string_view("unknown")
                             : words_[static_cast<std::size_t>(id - kFirst)];
    }
    return text;
  }

 private:
  std::vector<std::string_view> words_;
  std::map<std::string, std::int32_t, std::less<>> ids_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_word_tokenizer() { return std::make_unique<WordTokenizer>(); }

std::span<const std::string_view> label_words() { return kLabels; }
std::span<const std::string_view> letter_words() { return kLetters; }
std::span<const std::string_view> plain_words() { return kPlain; }

}  // namespace everlong
