// Text to token ids and back.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/files.h"

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
  // Whether the ids of a text are those of its pieces, wherever it is cut.
  virtual bool takes_any_piece() const { return false; }
  // The text of the ids. Specials and ids outside the vocabulary have none and drop out.
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;

  std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> ids;
    encode(text, ids);
    return ids;
  }
};

// "bytes": ids 0-255 are the bytes, 256 end of document, 257 begin of document, 258 pad.
// "words": the closed vocabulary of the synthetic tasks, data/word_tokenizer.h.
// "published": what `folder` has, tokenizer.json or tokenizer.model. "tokenizer.json HASH" and
// "tokenizer.model HASH", as datasets and models record it: that file in `folder`, which has to be
// the one of that hash. A path to such a file, or to a folder with one.
Result<std::unique_ptr<Tokenizer>> make_tokenizer(std::string_view name,
                                                  const fs::path& folder = {});

// What make_tokenizer needs besides the name: copies tokenizer.json or .model and what belongs to
// it, where `from` (a folder, or the file itself) has them. Datasets and models carry their own
// copy.
Status copy_tokenizer_files(const fs::path& from, const fs::path& to_folder);

}  // namespace everlong
