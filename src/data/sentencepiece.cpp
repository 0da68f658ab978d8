#include "data/sentencepiece.h"

#include <dlfcn.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>
#include <charconv>
#include <cstdio>

namespace everlong {
namespace {

constexpr const char* kModelFile = "tokenizer.model";
constexpr const char* kLibraryFile = "libsentencepiece.so.0";
constexpr std::string_view kSpelledBlank = "\u2581";  // what stands for a blank in pieces

// The library is opened beside us and not linked: it exports a protobuf of its own and a variable
// FLAGS_minloglevel, and so does LibTorch, of other versions and another type. Linked together, one
// of the two would write through the other's symbols; opened with RTLD_DEEPBIND each keeps its own.
// The names are those of its C++ classes (sentencepiece_processor.h): they hold the types of the
// arguments, so a library with other types has no such names and is refused.
struct PieceLibrary {
  // util::Status: one pointer, and a destructor of its own, so it is returned in memory.
  struct Outcome {
    void* content = nullptr;
    Outcome() = default;
    Outcome(const Outcome&) = delete;
    ~Outcome() {}
  };
  using Object = void;  // a SentencePieceProcessor
  void (*construct)(Object*) = nullptr;
  void (*destruct)(Object*) = nullptr;
  Outcome (*load)(Object*, std::string_view serialized) = nullptr;
  Outcome (*encode)(const Object*, std::string_view text, std::vector<int>* ids) = nullptr;
  int (*size)(const Object*) = nullptr;
  const std::string& (*piece)(const Object*, int id) = nullptr;
  bool (*is_control)(const Object*, int id) = nullptr;
  bool (*is_unknown)(const Object*, int id) = nullptr;
  bool (*is_byte)(const Object*, int id) = nullptr;
  int (*bos)(const Object*) = nullptr;
  int (*eos)(const Object*) = nullptr;
  int (*pad)(const Object*) = nullptr;
  int (*code)(const Outcome*) = nullptr;
  const char* (*message)(const Outcome*) = nullptr;
  void (*destruct_outcome)(Outcome*) = nullptr;

  static Result<PieceLibrary> open();

  // The failure that an outcome is, or none; ends the outcome.
  Status take(Outcome& outcome) const {
    Status status;
    if (code(&outcome) != 0)
      status = corrupt("the sentencepiece library says: ", message(&outcome));
    destruct_outcome(&outcome);
    return status;
  }
};

Result<PieceLibrary> PieceLibrary::open() {
  void* const opened = ::dlopen(kLibraryFile, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  if (opened == nullptr)
    return unsupported(kModelFile, " is read by a library that cannot be loaded here (",
                       ::dlerror(),
                       "); install libsentencepiece0 of Debian, or SentencePiece 0.1.97");
  PieceLibrary library;
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    void* const found = ::dlsym(opened, name);
    if (found == nullptr) missing = name;
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
#define EVERLONG_PROCESSOR "13sentencepiece22SentencePieceProcessor"
#define EVERLONG_VIEW "St17basic_string_viewIcSt11char_traitsIcEE"
  find(library.construct, "_ZN" EVERLONG_PROCESSOR "C1Ev");
  find(library.destruct, "_ZN" EVERLONG_PROCESSOR "D1Ev");
  find(library.load, "_ZN" EVERLONG_PROCESSOR "23LoadFromSerializedProtoE" EVERLONG_VIEW);
  find(library.encode, "_ZNK" EVERLONG_PROCESSOR "6EncodeE" EVERLONG_VIEW "PSt6vectorIiSaIiEE");
  find(library.size, "_ZNK" EVERLONG_PROCESSOR "12GetPieceSizeEv");
  find(library.piece, "_ZNK" EVERLONG_PROCESSOR "9IdToPieceB5cxx11Ei");
  find(library.is_control, "_ZNK" EVERLONG_PROCESSOR "9IsControlEi");
  find(library.is_unknown, "_ZNK" EVERLONG_PROCESSOR "9IsUnknownEi");
  find(library.is_byte, "_ZNK" EVERLONG_PROCESSOR "6IsByteEi");
  find(library.bos, "_ZNK" EVERLONG_PROCESSOR "6bos_idEv");
  find(library.eos, "_ZNK" EVERLONG_PROCESSOR "6eos_idEv");
  find(library.pad, "_ZNK" EVERLONG_PROCESSOR "6pad_idEv");
  find(library.code, "_ZNK13sentencepiece4util6Status4codeEv");
  find(library.message, "_ZNK13sentencepiece4util6Status13error_messageEv");
  find(library.destruct_outcome, "_ZN13sentencepiece4util6StatusD1Ev");
#undef EVERLONG_PROCESSOR
#undef EVERLONG_VIEW
  if (missing != nullptr)
    return unsupported(kLibraryFile, " lacks ", missing,
                       ": it is another version; install SentencePiece 0.1.97");
  return library;
}

// Never closed: its objects may live as long as the process.
const Result<PieceLibrary>& sentencepiece_library() {
  static const Result<PieceLibrary> kLibrary = PieceLibrary::open();
  return kLibrary;
}

class SentencePiece final : public Tokenizer {
 public:
  explicit SentencePiece(const PieceLibrary& library) : library_(library) {
    library_.construct(object_.data());
  }
  SentencePiece(const SentencePiece&) = delete;
  SentencePiece& operator=(const SentencePiece&) = delete;
  ~SentencePiece() override { library_.destruct(object_.data()); }

  Status load(const std::string& text) {
    {
      auto outcome = library_.load(object_.data(), text);
      EVERLONG_RETURN_IF_ERROR(library_.take(outcome));
    }
    const void* const object = object_.data();
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx",
                  static_cast<unsigned long long>(XXH3_64bits(text.data(), text.size())));
    name_ = cat(kModelFile, " ", digits);
    eod_ = library_.eos(object);
    bod_ = library_.bos(object);
    pad_ = library_.pad(object) >= 0 ? library_.pad(object) : eod_;
    const int size = library_.size(object);
    for (int id = 0; id < size; ++id) pieces_.push_back(text_of(id));
    // Whether the model puts a blank before a text, which no interface says: a text shows it.
    const auto ids = Tokenizer::encode("a");
    if (!ids.empty()) blank_first_ = decode(ids).starts_with(' ');
    return {};
  }

  std::string_view name() const override { return name_; }
  std::int64_t vocab_size() const override { return std::ssize(pieces_); }
  std::int32_t eod() const override { return eod_; }
  std::int32_t bod() const override { return bod_; }
  std::int32_t pad() const override { return pad_; }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override {
    std::vector<int> more;
    auto outcome = library_.encode(object_.data(), text, &more);
    // The library refuses no text once a model is loaded; if it did, the text would have no ids.
    if (library_.take(outcome).ok()) ids.insert(ids.end(), more.begin(), more.end());
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    bool begins = false;
    for (const std::int32_t id : ids) {
      if (id < 0 || id >= vocab_size()) continue;
      std::string_view piece = pieces_[static_cast<std::size_t>(id)];
      if (begins && blank_first_ && piece.starts_with(' ')) piece.remove_prefix(1);
      text += piece;
      begins = id == bod_ || id == eod_;
    }
    return text;
  }

 private:
  std::string text_of(int id) const {
    const void* const object = object_.data();
    if (library_.is_control(object, id)) return "";
    if (library_.is_unknown(object, id)) return " \u2047 ";  // as the library writes it
    const std::string& piece = library_.piece(object, id);
    if (library_.is_byte(object, id)) {  // "<0x0A>"
      unsigned byte = 0;
      if (piece.size() == 6) std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16);
      return {static_cast<char>(byte)};
    }
    std::string text;
    for (std::size_t i = 0; i < piece.size();) {
      const bool blank = std::string_view(piece).substr(i).starts_with(kSpelledBlank);
      text += blank ? ' ' : piece[i];
      i += blank ? kSpelledBlank.size() : 1;
    }
    return text;
  }

  const PieceLibrary& library_;
  // A SentencePieceProcessor takes 48 bytes in 0.1.97; room for those of other versions.
  alignas(std::max_align_t) std::array<std::byte, 512> object_{};
  std::string name_;
  std::int32_t eod_ = -1, bod_ = -1, pad_ = -1;
  bool blank_first_ = false;
  std::vector<std::string> pieces_;  // the bytes of each id
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> read_sentencepiece(const fs::path& file_or_folder) {
  std::error_code ignored;
  const fs::path path =
      fs::is_directory(file_or_folder, ignored) ? file_or_folder / kModelFile : file_or_folder;
  EVERLONG_ASSIGN(const std::string text, read_file(path));
  if (text.empty()) return corrupt(path.string(), ": is empty; a SentencePiece model is needed");
  const auto& library = sentencepiece_library();
  if (!library.ok()) return library.status().at(path.string());
  auto tokenizer = std::make_unique<SentencePiece>(*library);
  EVERLONG_RETURN_IF_ERROR(tokenizer->load(text).at(path.string()));
  if (tokenizer->eod() < 0)
    return unsupported(path.string(),
                       ": has no end symbol (</s>), with which documents end; train it with one");
  return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace everlong
