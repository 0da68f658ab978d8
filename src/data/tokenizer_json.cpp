#include "data/tokenizer_json.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "core/strict_json.h"
#include "data/byte_pairs.h"
#include "data/split_steps.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::int64_t kMostIds = 4 << 20;

// GPT-2's letters: printable bytes stand for themselves, the others for U+0100 and following.
const std::unordered_map<std::string, char>& byte_of_letter() {
  static const auto kMap = [] {
    std::unordered_map<std::string, char> map;
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const int letter = printable ? byte : next++;
      std::string text;
      if (letter < 0x80) {
        text = {static_cast<char>(letter)};
      } else {
        text = {static_cast<char>(0xC0 | letter >> 6), static_cast<char>(0x80 | (letter & 0x3F))};
      }
      map[text] = static_cast<char>(byte);
    }
    return map;
  }();
  return kMap;
}

struct AddedToken {
  std::string text;
  std::int32_t id = 0;
  bool strip_left = false, strip_right = false, special = false;
};

// Bytes of the white space character (Unicode's White_Space) that is all of `text`; 0: it is none.
std::size_t white_space(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.size() == 1) return (byte(0) >= 9 && byte(0) <= 13) || byte(0) == ' ' ? 1 : 0;
  if (text.size() == 2) return text == "\u0085" || text == "\u00A0" ? 2 : 0;
  if (text.size() != 3) return 0;
  const bool general = text.starts_with("\xE2\x80") &&
                       (byte(2) <= 0x8A || byte(2) == 0xA8 || byte(2) == 0xA9 || byte(2) == 0xAF);
  return general || text == "\u1680" || text == "\u205F" || text == "\u3000" ? 3 : 0;
}
std::size_t spaces_before(std::string_view text) {
  std::size_t count = 0;
  for (std::size_t size = 1; size <= 3 && size <= text.size() - count; ++size)
    if (white_space(text.substr(text.size() - count - size, size)) != 0) count += size, size = 0;
  return count;
}
std::size_t spaces_after(std::string_view text) {
  std::size_t count = 0;
  for (std::size_t size = 1; size <= 3 && size <= text.size() - count; ++size)
    if (white_space(text.substr(count, size)) != 0) count += size, size = 0;
  return count;
}

class JsonTokenizer final : public Tokenizer {
 public:
  JsonTokenizer(std::string name, SplitSteps steps, BytePairs pairs, std::vector<AddedToken> added)
      : name_(std::move(name)), steps_(std::move(steps)), pairs_(std::move(pairs)) {
    vocab_size_ = pairs_.size();
    for (AddedToken& token : added) {
      vocab_size_ = std::max<std::int64_t>(vocab_size_, token.id + 1);
      if (!token.special) in_text_[static_cast<unsigned char>(token.text[0])].push_back(token);
      added_[token.id] = std::move(token);
    }
    for (auto& tokens : in_text_)  // the longest wins
      std::ranges::stable_sort(tokens, std::greater(),
                               [](const AddedToken& t) { return t.text.size(); });
  }

  std::string_view name() const override { return name_; }
  std::int64_t vocab_size() const override { return vocab_size_; }
  std::int32_t eod() const override { return eod_; }
  std::int32_t bod() const override { return bod_; }
  std::int32_t pad() const override { return pad_; }

  // The id of an added token by its text; -1: there is none.
  std::int32_t added(std::string_view text) const {
    for (const auto& [id, token] : added_)
      if (token.text == text) return id;
    return -1;
  }
  void set_roles(std::int32_t eod, std::int32_t bod, std::int32_t pad) {
    eod_ = eod;
    bod_ = bod;
    pad_ = pad;
  }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override {
    std::size_t done = 0;
    for (std::size_t i = 0; i < text.size();) {
      const AddedToken* const token = added_at(text.substr(i));
      if (token == nullptr) {
        ++i;
        continue;
      }
      std::size_t begin = i, end = i + token->text.size();
      if (token->strip_left) begin -= spaces_before(text.substr(done, begin - done));
      if (token->strip_right) end += spaces_after(text.substr(end));
      encode_plain(text.substr(done, begin - done), ids);
      ids.push_back(token->id);
      done = i = end;
    }
    encode_plain(text.substr(done), ids);
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    for (const std::int32_t id : ids) {
      if (const auto token = added_.find(id); token != added_.end()) {
        if (!token->second.special) text += token->second.text;
      } else {
        text += pairs_.bytes_of(id);
      }
    }
    return text;
  }

 private:
  const AddedToken* added_at(std::string_view text) const {
    for (const AddedToken& token : in_text_[static_cast<unsigned char>(text[0])])
      if (text.starts_with(token.text)) return &token;
    return nullptr;
  }
  void encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const {
    if (text.empty()) return;
    std::vector<std::string> storage;
    std::vector<std::string_view> pieces;
    steps_.cut(text, storage, pieces);
    for (const std::string_view piece : pieces) pairs_.encode(piece, ids);
  }

  std::string name_;
  SplitSteps steps_;
  BytePairs pairs_;
  std::int64_t vocab_size_ = 0;
  std::int32_t eod_ = -1, bod_ = -1, pad_ = -1;
  std::unordered_map<std::int32_t, AddedToken> added_;
  std::array<std::vector<AddedToken>, 256> in_text_;  // by first byte, longest first
};

Result<std::vector<AddedToken>> read_added(const json& list) {
  std::vector<AddedToken> added;
  if (list.is_null()) return added;
  if (!list.is_array()) return invalid_argument("added_tokens is no list");
  for (const json& entry : list) {
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_integer() ||
        !entry.contains("content") || !entry["content"].is_string())
      return invalid_argument("added_tokens holds ", entry.dump(), "; id and content are needed");
    const auto flag = [&](const char* name) {
      return entry.contains(name) && entry[name].is_boolean() && entry[name].get<bool>();
    };
    const std::int64_t id = entry["id"];
    AddedToken token{entry["content"], static_cast<std::int32_t>(id), flag("lstrip"),
                     flag("rstrip"), flag("special")};
    if (id < 0 || id >= kMostIds || token.text.empty())
      return invalid_argument("added token \"", token.text, "\" has id ", id, "; 0 to ",
                              kMostIds - 1, " and a text are needed");
    if (flag("single_word") && !token.special)
      return unsupported("added token \"", token.text, "\" is single_word, which is not supported");
    added.push_back(std::move(token));
  }
  return added;
}

Status refuse(const json& model, const char* key, std::initializer_list<json> harmless) {
  if (!model.contains(key) || model[key].is_null() ||
      std::ranges::find(harmless, model[key]) != harmless.end())
    return {};
  return unsupported("model.", key, " = ", model[key].dump(), " is not supported");
}

Result<BytePairs> read_model(const json& model, const std::vector<AddedToken>& added) {
  if (!model.is_object() || !model.contains("vocab") || !model["vocab"].is_object() ||
      !model.contains("merges") || !model["merges"].is_array() ||
      (model.contains("type") && model["type"] != "BPE"))
    return unsupported("the model is not BPE with vocab and merges; only byte-level BPE is read");
  EVERLONG_RETURN_IF_ERROR(refuse(model, "dropout", {0, 0.0}));
  EVERLONG_RETURN_IF_ERROR(refuse(model, "byte_fallback", {false}));
  EVERLONG_RETURN_IF_ERROR(refuse(model, "continuing_subword_prefix", {""}));
  EVERLONG_RETURN_IF_ERROR(refuse(model, "end_of_word_suffix", {""}));

  std::unordered_set<std::int32_t> added_ids;
  for (const AddedToken& token : added) added_ids.insert(token.id);
  std::unordered_map<std::string, std::int32_t> ids;
  std::vector<std::string> bytes_of;
  for (const auto& [spelling, value] : model["vocab"].items()) {
    if (!value.is_number_integer() || value < 0 || value >= kMostIds)
      return invalid_argument("vocab: \"", spelling, "\" has id ", value.dump(), "; 0 to ",
                              kMostIds - 1, " are allowed");
    const auto id = value.get<std::size_t>();
    if (id >= bytes_of.size()) bytes_of.resize(id + 1);
    ids[spelling] = static_cast<std::int32_t>(id);
    if (added_ids.contains(static_cast<std::int32_t>(id))) continue;  // merging never makes it
    if (auto bytes = bytes_of_spelling(spelling)) {
      if (!bytes_of[id].empty())
        return invalid_argument("vocab: id ", id, " is given to two tokens");
      bytes_of[id] = std::move(*bytes);
    }
  }
  std::vector<BytePairs::Merge> merges;
  for (const json& merge : model["merges"]) {
    std::string left, right;
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const auto space = text.find(' ');
      if (space != std::string::npos) left = text.substr(0, space), right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0], right = merge[1];
    }
    const auto a = ids.find(left), b = ids.find(right), both = ids.find(left + right);
    if (left.empty() || a == ids.end() || b == ids.end() || both == ids.end())
      return invalid_argument("merges: ", merge.dump(),
                              " does not join two tokens of the vocabulary into a third");
    merges.push_back({a->second, b->second, both->second});
  }
  const bool whole = model.contains("ignore_merges") && model["ignore_merges"] == true;
  return BytePairs::make(std::move(bytes_of), merges, whole);
}

// eos_token, bos_token, pad_token of tokenizer_config.json: a text, or an object with content.
std::string role_of(const json& config, const char* key) {
  if (!config.contains(key)) return {};
  const json& value = config[key];
  if (value.is_string()) return value;
  if (value.is_object() && value.contains("content") && value["content"].is_string())
    return value["content"];
  return {};
}

Result<std::unique_ptr<Tokenizer>> parse(const std::string& text, const json& config) {
  EVERLONG_ASSIGN(const json file, parse_strict_object(text, "tokenizer"));
  const json normalizer = file.value("normalizer", json());
  const bool does_nothing = normalizer.is_null() ||
                            (normalizer.is_object() && normalizer.value("type", "") == "Sequence" &&
                             normalizer.value("normalizers", json::array()).empty());
  if (!does_nothing)
    return unsupported("normalizer ", normalizer.is_object() ? normalizer.value("type", "") : "",
                       " is not supported: it would change the text");
  EVERLONG_ASSIGN(auto added, read_added(file.value("added_tokens", json())));
  EVERLONG_ASSIGN(auto steps, SplitSteps::read(file.value("pre_tokenizer", json())));
  EVERLONG_ASSIGN(auto pairs, read_model(file.value("model", json()), added));
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(text.data(), text.size())));
  auto tokenizer = std::make_unique<JsonTokenizer>(cat("tokenizer.json ", hash), std::move(steps),
                                                   std::move(pairs), std::move(added));
  const auto first_of = [&](const char* key, std::initializer_list<const char*> usual) {
    if (const std::string role = role_of(config, key); !role.empty()) return tokenizer->added(role);
    for (const char* name : usual)
      if (const std::int32_t id = tokenizer->added(name); id >= 0) return id;
    return -1;
  };
  const std::int32_t eod = first_of("eos_token", {"<|end_of_text|>", "<|endoftext|>", "</s>"});
  const std::int32_t bod = first_of("bos_token", {"<|begin_of_text|>", "<|endoftext|>", "<s>"});
  const std::int32_t pad = first_of("pad_token", {"<pad>", "<|pad|>"});
  tokenizer->set_roles(eod, bod, pad >= 0 ? pad : eod);
  return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace

std::optional<std::string> bytes_of_spelling(std::string_view spelling) {
  std::string bytes;
  for (std::size_t i = 0; i < spelling.size();) {
    const std::size_t size = static_cast<unsigned char>(spelling[i]) < 0x80 ? 1 : 2;
    const auto found = byte_of_letter().find(std::string(spelling.substr(i, size)));
    if (found == byte_of_letter().end()) return std::nullopt;
    bytes += found->second;
    i += size;
  }
  return bytes;
}

Result<std::unique_ptr<Tokenizer>> read_tokenizer_json(const fs::path& file_or_folder) {
  std::error_code ignored;
  const fs::path file = fs::is_directory(file_or_folder, ignored)
                            ? file_or_folder / "tokenizer.json"
                            : file_or_folder;
  EVERLONG_ASSIGN(const std::string text, read_file(file));
  json config = json::object();
  const fs::path beside = file.parent_path() / "tokenizer_config.json";
  if (fs::exists(beside, ignored)) {
    EVERLONG_ASSIGN(const std::string config_text, read_file(beside));
    EVERLONG_ASSIGN(config, parse_strict_object(config_text, "tokenizer_config.json"));
  }
  auto tokenizer = parse(text, config);
  if (!tokenizer.ok()) return tokenizer.status().at(file.string());
  return tokenizer;
}

}  // namespace everlong
