// Text to token ids and back.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong {

// Immutable and thread safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string_view name() const = 0;
  virtual std::int64_t vocab_size() const = 0;
  // Special ids; no text encodes to them. End of document closes every document of a dataset, begin
  // of document may open a prompt that is otherwise empty, pad fills what no loss looks at.
  virtual std::int32_t eod() const = 0;
  virtual std::int32_t bod() const = 0;
  virtual std::int32_t pad() const = 0;
  // Appends the ids of `text`. Any bytes are legal.
  virtual void encode(std::string_view text, std::vector<std::int32_t>& ids) const = 0;
  // The text of the ids. Specials and ids outside the vocabulary have none and drop out.
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;

  std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> ids;
    encode(text, ids);
    return ids;
  }
};

// "bytes": ids 0-255 are the bytes, 256 end of document, 257 begin of document, 258 pad.
Result<std::unique_ptr<Tokenizer>> make_tokenizer(std::string_view name);

}  // namespace everlong
