#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/pattern.h"

#include <pcre2.h>

namespace everlong {
namespace {

constexpr std::string_view kWhiteSpace = "\\p{Z}\\x{09}-\\x{0D}\\x{85}";

// Deep patterns over long text need a stack of their own; without one a match stops with an error.
constexpr std::size_t kStackStart = 64 << 10, kStackMost = 16 << 20;

std::string with_unicode_spaces(std::string_view expression) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i];
    if (c == '\\' && i + 1 < expression.size()) {
      const char next = expression[++i];
      if (next == 's') {
        out += in_class ? std::string(kWhiteSpace) : cat("[", kWhiteSpace, "]");
      } else if (next == 'S' && !in_class) {
        out += cat("[^", kWhiteSpace, "]");
      } else {
        out += c;
        out += next;
      }
      continue;
    }
    if (c == '[') in_class = true;
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

const pcre2_code* code_of(const std::shared_ptr<const void>& code) {
  return static_cast<const pcre2_code*>(code.get());
}

// What one thread needs to match; kept for the thread's next calls.
class Matching {
 public:
  Matching()
      : data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(kStackStart, kStackMost, nullptr)) {
    pcre2_jit_stack_assign(context_, nullptr, stack_);
  }
  ~Matching() {
    pcre2_jit_stack_free(stack_);
    pcre2_match_context_free(context_);
    pcre2_match_data_free(data_);
  }
  Matching(const Matching&) = delete;
  Matching& operator=(const Matching&) = delete;

  // The first match at or after `from`; false: none.
  bool find(const pcre2_code* code, std::string_view text, std::size_t from, std::size_t& begin,
            std::size_t& end) {
    const int found = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                  from, 0, data_, context_);
    if (found < 0) return false;
    const PCRE2_SIZE* const bounds = pcre2_get_ovector_pointer(data_);
    begin = bounds[0];
    end = bounds[1];
    return true;
  }

 private:
  pcre2_match_data* data_;
  pcre2_match_context* context_;
  pcre2_jit_stack* stack_;
};

}  // namespace

Result<Pattern> Pattern::compile(std::string_view expression) {
  const std::string translated = with_unicode_spaces(expression);
  int error = 0;
  PCRE2_SIZE where = 0;
  pcre2_code* const code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF | PCRE2_NEVER_BACKSLASH_C,
                    &error, &where, nullptr);
  if (code == nullptr) {
    char reason[256] = {};
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
    return invalid_argument("pattern \"", expression, "\" is no regular expression: ", reason,
                            " at byte ", where);
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // slower without, where the machine has no JIT
  return Pattern(std::shared_ptr<const void>(code, [](const void* p) {
    pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p)));
  }));
}

void Pattern::split(std::string_view text,
                    const std::function<void(std::string_view, bool matched)>& piece) const {
  thread_local Matching matching;
  std::size_t done = 0, from = 0, begin = 0, end = 0;
  while (from < text.size() && matching.find(code_of(code_), text, from, begin, end)) {
    if (end == begin) {  // an empty match splits nothing
      from = end + 1;
      while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0) == 0x80) ++from;
      continue;
    }
    if (begin > done) piece(text.substr(done, begin - done), false);
    piece(text.substr(begin, end - begin), true);
    done = from = end;
  }
  if (done < text.size()) piece(text.substr(done), false);
}

}  // namespace everlong
