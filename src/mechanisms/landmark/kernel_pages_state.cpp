// Saving and restoring a stream's block memory: the state file (docs/formats.md, "Block state").
#include <bit>
#include <cstddef>

#include "mechanisms/landmark/kernel_pages.h"
#include "mechanisms/landmark/kernel_pages_segment.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace everlong::landmark {
namespace {

static_assert(std::endian::native == std::endian::little, "state files are little endian");

constexpr char kMagic[8] = {'E', 'V', 'L', 'B', 'L', 'K', 'S', '1'};
constexpr std::uint32_t kVersion = 1;

struct Header {
  char magic[8];
  std::uint32_t version, dtype;  // dtype: 0 fp32, 1 bf16
  std::uint64_t file_id;         // of the page file
  std::int64_t kv_heads, block, key_dim, value_dim;
  std::int64_t first, end;  // blocks
  std::int64_t extra;       // bytes
};
static_assert(sizeof(Header) == 80);

Header header_of(const PageStore& store, std::int64_t first, std::int64_t end, std::size_t extra) {
  const PageShape& s = store.shape();
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.dtype = s.dtype == DType::kBFloat16 ? 1 : 0;
  header.file_id = store.file_id();
  header.kv_heads = s.kv_heads;
  header.block = s.block;
  header.key_dim = s.key_dim;
  header.value_dim = s.value_dim;
  header.first = first;
  header.end = end;
  header.extra = static_cast<std::int64_t>(extra);
  return header;
}

// What a block and head take: landmark key, value norm, record, checksum.
std::int64_t entry_bytes(const PageShape& s) { return s.key_dim * s.element() + 4 + 8 + 8; }

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

// Reads trivial values one after another; the length was checked before.
struct Reader {
  const std::byte* next;

  void read(void* to, std::size_t bytes) {
    std::memcpy(to, next, bytes);
    next += bytes;
  }
  template <class T>
  T read() {
    T value{};
    read(&value, sizeof value);
    return value;
  }
};

void put(std::byte*& to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
  to += bytes;
}

Status check_state(std::span<const std::byte> bytes, const PageStore& store, Header& header) {
  if (bytes.size() < sizeof(Header) + 8) return corrupt("is too short for a block state");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return corrupt("is no block state");
  if (header.version != kVersion)
    return unsupported("block state of version ", header.version, "; this reads ", kVersion);
  const auto body = bytes.first(bytes.size() - 8);
  std::uint64_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + body.size(), 8);
  if (checksum != XXH3_64bits(body.data(), body.size()))
    return corrupt("the checksum does not match its bytes");
  Header wanted = header_of(store, header.first, header.end, 0);
  wanted.extra = header.extra;
  wanted.file_id = header.file_id;
  if (std::memcmp(&wanted, &header, sizeof header) != 0)
    return invalid_argument(
        "holds other blocks (", header.kv_heads, " heads, blocks of ", header.block, ", keys of ",
        header.key_dim, ", values of ", header.value_dim, ") than the store (", wanted.kv_heads,
        ", ", wanted.block, ", ", wanted.key_dim, ", ", wanted.value_dim, "), or another dtype");
  if (header.file_id != store.file_id())
    return invalid_argument(
        "belongs to another page file than the store's; open the store with "
        "the file that it was saved with");
  const PageShape& s = store.shape();
  const auto room = static_cast<std::int64_t>(body.size() - sizeof header);
  const std::int64_t most = room / (entry_bytes(s) * s.kv_heads);
  if (header.first < 0 || header.end < header.first || header.end - header.first > most ||
      header.extra < 0 || header.extra > room ||
      (header.end - header.first) * entry_bytes(s) * s.kv_heads + header.extra != room)
    return corrupt("its length does not fit its ", header.end - header.first, " blocks");
  return {};
}

}  // namespace

void BlockPages::mark_saved(const Segments& segments, bool saved) {
  for (const auto& segment : segments) store_->mark_saved(segment->owned(), saved);
}

Status BlockPages::save(const fs::path& path, std::span<const std::byte> extra) {
  const PageShape& s = shape();
  std::vector<PageStore::Page> all;
  for (const auto& segment : segments_)
    all.insert(all.end(), segment->owned().begin(), segment->owned().end());
  EVERLONG_RETURN_IF_ERROR(store_->commit(all));

  EVERLONG_ASSIGN(auto target, AtomicFile::create(path));
  HashedFile file(std::move(target));
  const Header header = header_of(*store_, first_, end_, extra.size());
  EVERLONG_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(&header, 1))));
  std::vector<std::byte> entries(static_cast<std::size_t>(entry_bytes(s) * s.kv_heads));
  for (std::int64_t block = first_; block < end_; ++block) {
    const Segment& segment = segment_of(block);
    const std::int64_t at = block % per_segment_;
    std::byte* to = entries.data();
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      const auto width = static_cast<std::size_t>(s.element());
      const std::byte* tile = segment.tile(g, at / kTileBlocks);
      for (std::int64_t c = 0; c < s.key_dim; ++c)
        put(to, tile + static_cast<std::size_t>(c * kTileBlocks + at % kTileBlocks) * width, width);
      const float norm = segment.norm(at, g);
      const auto place = store_->place(segment.page(at, g));
      put(to, &norm, sizeof norm);
      put(to, &place.record, sizeof place.record);
      put(to, &place.checksum, sizeof place.checksum);
    }
    EVERLONG_RETURN_IF_ERROR(file.write(entries));
  }
  EVERLONG_RETURN_IF_ERROR(file.write(extra));

  // From the commit on a restart finds the new state, so its pages must keep their records first.
  Segments named = snapshot();
  mark_saved(named, true);
  if (const Status status = file.commit(); !status.ok()) {
    mark_saved(named, false);
    return status;
  }
  mark_saved(saved_, false);
  saved_ = std::move(named);
  return {};
}

Result<BlockPages> BlockPages::restore(const std::shared_ptr<PageStore>& store,
                                       const fs::path& path, std::int64_t max_blocks,
                                       std::vector<std::byte>* extra) {
  EVERLONG_ASSIGN(const auto file, MappedFile::open(path));
  Header header{};
  EVERLONG_RETURN_IF_ERROR(check_state(file.bytes(), *store, header).at(path.string()));
  const PageShape s = store->shape();
  const std::int64_t count = (header.end - header.first) * s.kv_heads;
  const auto key_bytes = static_cast<std::size_t>(s.key_dim * s.element());

  std::vector<PageFile::Place> places(static_cast<std::size_t>(count));
  Reader reader{file.bytes().data() + sizeof header};
  for (PageFile::Place& place : places) {
    reader.next += key_bytes + 4;
    place.record = reader.read<std::int64_t>();
    place.checksum = reader.read<std::uint64_t>();
  }
  std::size_t failed = 0;
  auto pages = store->adopt(places, &failed);
  if (!pages.ok())
    return pages.status().at(cat(path.string(), ": block ",
                                 header.first + static_cast<std::int64_t>(failed) / s.kv_heads,
                                 ", head ", static_cast<std::int64_t>(failed) % s.kv_heads));

  BlockPages stream(store, max_blocks, header.first);
  reader.next = file.bytes().data() + sizeof header;
  for (std::size_t next = 0; stream.end_ < header.end; ++stream.end_) {
    Segment& segment = stream.open_segment();
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      const std::byte* key = reader.next;
      reader.next += key_bytes;
      segment.add_head(g, key, reader.read<float>());
      reader.next += 16;
    }
    segment.add_pages(std::span(*pages).subspan(next, static_cast<std::size_t>(s.kv_heads)));
    next += static_cast<std::size_t>(s.kv_heads);
  }
  if (extra != nullptr)
    extra->assign(reader.next, reader.next + static_cast<std::size_t>(header.extra));
  stream.saved_ = stream.snapshot();
  stream.drop_old();
  return stream;
}

}  // namespace everlong::landmark
