#include "data/tokenizer.h"

#include "data/sentencepiece.h"
#include "data/tokenizer_json.h"
#include "data/word_tokenizer.h"

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
  bool takes_any_piece() const override { return true; }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    text.reserve(ids.size());
    for (const std::int32_t id : ids)
      if (id >= 0 && id < 256) text.push_back(static_cast<char>(id));
    return text;
  }
};

constexpr std::string_view kJsonKind = "tokenizer.json ", kModelKind = "tokenizer.model ";

// The folder's tokenizer, or the file's. Folders with both files (Llama 2) have one tokenizer in
// two forms: the form that can be read counts.
Result<std::unique_ptr<Tokenizer>> read_published(const fs::path& path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored))
    return path.extension() == ".model" ? read_sentencepiece(path) : read_tokenizer_json(path);
  const bool has_model = fs::exists(path / "tokenizer.model", ignored);
  if (!fs::exists(path / "tokenizer.json", ignored) && has_model) return read_sentencepiece(path);
  auto tokenizer = read_tokenizer_json(path);
  if (tokenizer.ok() || !has_model || tokenizer.status().code() != StatusCode::kUnsupported)
    return tokenizer;
  return read_sentencepiece(path);
}

}  // namespace

Result<std::unique_ptr<Tokenizer>> make_tokenizer(std::string_view name, const fs::path& folder) {
  if (name == "bytes") return std::unique_ptr<Tokenizer>(std::make_unique<ByteTokenizer>());
  if (name == "words") return make_word_tokenizer();
  if (name == "published") return read_published(folder);
  if (const bool json = name.starts_with(kJsonKind); json || name.starts_with(kModelKind)) {
    EVERLONG_ASSIGN(auto tokenizer,
                    json ? read_tokenizer_json(folder) : read_sentencepiece(folder));
    if (tokenizer->name() != name)
      return invalid_argument(folder.string(), ": its tokenizer is another one (",
                              tokenizer->name(), "); ", name, " is needed");
    return tokenizer;
  }
  std::error_code ignored;
  if (fs::exists(name, ignored)) return read_published(name);
  return invalid_argument("tokenizer \"", name,
                          "\" is not known; known: bytes, words, or a path to a tokenizer.json or ",
                          "a tokenizer.model");
}

Status copy_tokenizer_files(const fs::path& from, const fs::path& to_folder) {
  std::error_code ignored;
  const fs::path folder = fs::is_directory(from, ignored) ? from : from.parent_path();
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}) {
    if (!fs::exists(folder / name, ignored) || fs::equivalent(folder, to_folder, ignored)) continue;
    EVERLONG_ASSIGN(const std::string text, read_file(folder / name));
    EVERLONG_RETURN_IF_ERROR(make_directories(to_folder));
    EVERLONG_RETURN_IF_ERROR(write_file(to_folder / name, text));
  }
  return {};
}

}  // namespace everlong
