// Tokens to be read in order by an evaluation: of a dataset's split, or of one text.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/tokenizer.h"

namespace everlong {

class TokenSource {
 public:
  explicit TokenSource(SplitView split) : split_(std::move(split)) {}
  // A file of text as one document. Held in memory as tokens.
  static Result<TokenSource> from_text(const fs::path& path, const Tokenizer& tokenizer);

  std::int64_t tokens() const;
  // Copies [position, position + out.size()), which must lie within tokens(). A dataset's tokens
  // leave the process's memory again, so a long text read in order takes none.
  Status read(std::int64_t position, std::span<std::int32_t> out) const;
  // Where the document that holds `position` ends.
  std::int64_t document_end(std::int64_t position) const;

 private:
  TokenSource() = default;
  std::optional<SplitView> split_;
  std::vector<std::int32_t> text_;
};

}  // namespace everlong
