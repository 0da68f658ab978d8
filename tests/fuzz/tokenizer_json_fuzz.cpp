// Any bytes as tokenizer.json; what is accepted encodes and decodes any text without harm.
#include "data/tokenizer_json.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto tokenizer = read_tokenizer_json(fuzz::file("tokenizer.json", data, size));
  if (!fuzz::accepted(tokenizer)) return 0;
  const auto ids = (*tokenizer)->encode("The 12 na\xc3\xafve streams\xff\n\n end.");
  for (const auto id : ids)
    fuzz::require(id >= 0 && id < (*tokenizer)->vocab_size(), "ids lie in the vocabulary");
  (void)(*tokenizer)->decode(ids);
  const std::int32_t strange[] = {-1, 0, 1, 1 << 30};
  (void)(*tokenizer)->decode(strange);
  return 0;
}
