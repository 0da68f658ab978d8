// Any bytes as text, through three tokenizers: ids lie in the vocabulary, and come back as the
// text.
#include <vector>

#include "data/tokenizer.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto tokenizers = [] {
    std::vector<std::unique_ptr<Tokenizer>> made;
    for (const char* const name : {"gpt2", "llama3", "cl100k"})
      made.push_back(
          std::move(make_tokenizer(cat(EVERLONG_TOKENIZERS, "/", name, ".json")).value()));
    return made;
  }();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const auto& tokenizer : tokenizers) {
    const auto ids = tokenizer->encode(text);
    for (const auto id : ids)
      fuzz::require(id >= 0 && id < tokenizer->vocab_size(), "ids lie in the vocabulary");
    // This added token takes the white space around it along, as its file says.
    if (text.find("<think>") == text.npos)
      fuzz::require(tokenizer->decode(ids) == text, "text goes there and back");
  }
  return 0;
}
