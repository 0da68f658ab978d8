#include "eval/token_source.h"

#include <algorithm>

namespace everlong {

Result<TokenSource> TokenSource::from_text(const fs::path& path, const Tokenizer& tokenizer) {
  EVERLONG_ASSIGN(const auto file, MappedFile::open(path));
  const auto bytes = file.bytes();
  TokenSource source;
  tokenizer.encode({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, source.text_);
  if (source.text_.empty())
    return invalid_argument(path.string(), ": the file is empty; there is nothing to read");
  return source;
}

std::int64_t TokenSource::tokens() const {
  return split_ ? split_->tokens() : static_cast<std::int64_t>(text_.size());
}

Status TokenSource::read(std::int64_t position, std::span<std::int32_t> out) const {
  if (split_) {
    EVERLONG_RETURN_IF_ERROR(split_->read(position, out));
    split_->release(position, std::ssize(out));
    return {};
  }
  std::copy_n(text_.begin() + position, out.size(), out.begin());
  return {};
}

std::int64_t TokenSource::document_end(std::int64_t position) const {
  return split_ ? split_->document_start(split_->document_at(position) + 1) : tokens();
}

}  // namespace everlong
