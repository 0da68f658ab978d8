#include "data/tokenizer.h"

namespace everlong {
namespace {

class ByteTokenizer : public Tokenizer {
 public:
  std::string_view name() const override { return "bytes"; }
  std::int64_t vocab_size() const override { return 259; }
  std::int32_t eod() const override { return 256; }
  std::int32_t bod() const override { return 257; }
  std::int32_t pad() const override { return 258; }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override {
    ids.reserve(ids.size() + text.size());
    for (const char byte : text) ids.push_back(static_cast<unsigned char>(byte));
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    text.reserve(ids.size());
    for (const std::int32_t id : ids)
      if (id >= 0 && id < 256) text.push_back(static_cast<char>(id));
    return text;
  }
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> make_tokenizer(std::string_view name) {
  if (name == "bytes") return std::unique_ptr<Tokenizer>(std::make_unique<ByteTokenizer>());
  return invalid_argument("tokenizer \"", name, "\" is not known; known: bytes");
}

}  // namespace everlong
