#include "data/shards.h"

#include <algorithm>
#include <bit>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace everlong {
namespace {

static_assert(std::endian::native == std::endian::little,
              "shards are little endian and are mapped as they are");

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t element_bytes;
  std::uint64_t tokens;
  std::uint64_t documents;
};
static_assert(sizeof(Header) == 32);

constexpr Header kHeader = {
    {'E', 'V', 'L', 'T', 'O', 'K', '1', '\0'}, 1, sizeof(std::uint16_t), 0, 0};
constexpr std::uint64_t kChecksumBytes = 8;

constexpr std::uint64_t padding_after(std::uint64_t tokens) {
  return (8 - tokens * sizeof(std::uint16_t) % 8) % 8;
}

// Both counts are within kMaxShardTokens, so nothing overflows.
constexpr std::uint64_t file_bytes(std::uint64_t tokens, std::uint64_t documents) {
  return sizeof(Header) + tokens * sizeof(std::uint16_t) + padding_after(tokens) +
         (documents + 1) * 8 + kChecksumBytes;
}

Status check_starts(std::span<const std::uint64_t> starts, std::uint64_t tokens) {
  if (starts.empty() || starts.front() != 0)
    return corrupt("the first document does not start at token 0");
  if (starts.back() != tokens)
    return corrupt("the last document ends at token ", starts.back(), ", but there are ", tokens,
                   " tokens");
  const auto wrong = std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<>());
  if (wrong != starts.end())
    return corrupt("document ", wrong - starts.begin(), " spans tokens ", wrong[0], " to ",
                   wrong[1], "; every document has at least one token");
  return {};
}

class HashedFile {
 public:
  explicit HashedFile(AtomicFile file) : file_(std::move(file)) { XXH3_64bits_reset(&hash_); }
  Status write(std::span<const std::byte> bytes) {
    XXH3_64bits_update(&hash_, bytes.data(), bytes.size());
    return file_.write(bytes);
  }
  Status commit() {
    const std::uint64_t checksum = XXH3_64bits_digest(&hash_);
    EVERLONG_RETURN_IF_ERROR(file_.write(std::as_bytes(std::span(&checksum, 1))));
    return file_.commit();
  }

 private:
  AtomicFile file_;
  XXH3_state_t hash_;
};

}  // namespace

Status write_shard(const fs::path& path, std::span<const std::uint16_t> tokens,
                   std::span<const std::uint64_t> document_starts) {
  if (static_cast<std::int64_t>(tokens.size()) > kMaxShardTokens)
    return invalid_argument(path.string(), ": ", tokens.size(), " tokens; a shard holds at most ",
                            kMaxShardTokens);
  if (const Status wrong = check_starts(document_starts, tokens.size()); !wrong.ok())
    return invalid_argument(wrong.message()).at(path.string());
  Header header = kHeader;
  header.tokens = tokens.size();
  header.documents = document_starts.size() - 1;
  constexpr std::byte kZeros[8] = {};

  EVERLONG_ASSIGN(auto target, AtomicFile::create(path));
  HashedFile file(std::move(target));
  EVERLONG_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(&header, 1))));
  EVERLONG_RETURN_IF_ERROR(file.write(std::as_bytes(tokens)));
  EVERLONG_RETURN_IF_ERROR(file.write(std::span(kZeros).first(padding_after(tokens.size()))));
  EVERLONG_RETURN_IF_ERROR(file.write(std::as_bytes(document_starts)));
  return file.commit();
}

Result<Shard> Shard::open(const fs::path& path) {
  EVERLONG_ASSIGN(auto file, MappedFile::open(path));
  Shard shard(std::move(file));
  if (const Status wrong = shard.read_layout(); !wrong.ok()) return wrong.at(path.string());
  return shard;
}

Status Shard::read_layout() {
  const auto bytes = file_.bytes();
  if (bytes.size() < file_bytes(0, 0))
    return corrupt("has ", bytes.size(), " bytes; the smallest token shard has ", file_bytes(0, 0));
  Header header;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kHeader.magic, sizeof header.magic) != 0)
    return corrupt("is not a token shard (it does not begin with \"EVLTOK1\")");
  if (header.version != kHeader.version)
    return unsupported("token shard of version ", header.version, "; this program reads version ",
                       kHeader.version);
  if (header.element_bytes != kHeader.element_bytes)
    return unsupported("tokens of ", header.element_bytes, " bytes; this program reads ",
                       kHeader.element_bytes);
  if (header.tokens > kMaxShardTokens || header.documents > header.tokens)
    return corrupt("claims ", header.tokens, " tokens in ", header.documents,
                   " documents; at most ", kMaxShardTokens,
                   " tokens and one document a token are legal");
  const std::uint64_t expected = file_bytes(header.tokens, header.documents);
  if (bytes.size() != expected)
    return corrupt("has ", bytes.size(), " bytes, but its header (", header.tokens, " tokens, ",
                   header.documents, " documents) asks for ", expected,
                   ": it was cut short or changed; prepare the dataset again");

  const std::byte* at = bytes.data() + sizeof header;
  tokens_ = {reinterpret_cast<const std::uint16_t*>(at), header.tokens};
  at += tokens_.size_bytes();
  const auto padding = std::span(at, padding_after(header.tokens));
  if (std::any_of(padding.begin(), padding.end(), [](std::byte b) { return b != std::byte{0}; }))
    return corrupt("the padding after the tokens is not zero");
  at += padding.size();
  document_starts_ = {reinterpret_cast<const std::uint64_t*>(at), header.documents + 1};
  return check_starts(document_starts_, header.tokens);
}

Status Shard::verify() const {
  const auto bytes = file_.bytes();
  const std::size_t hashed = bytes.size() - kChecksumBytes;
  std::uint64_t stored = 0;
  std::memcpy(&stored, bytes.data() + hashed, sizeof stored);
  if (XXH3_64bits(bytes.data(), hashed) == stored) return {};
  return corrupt(path().string(),
                 ": the checksum does not match its bytes; prepare the dataset again");
}

}  // namespace everlong
