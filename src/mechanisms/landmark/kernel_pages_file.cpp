#include "mechanisms/landmark/kernel_pages_file.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <random>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace everlong::landmark {
namespace {

static_assert(std::endian::native == std::endian::little, "page files are little endian");

constexpr char kMagic[8] = {'E', 'V', 'L', 'P', 'A', 'G', 'E', '1'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kRecordMagic = 0x44524F4345524745;  // "EGRECORD"

struct FileHeader {
  char magic[8];
  std::uint32_t version, dtype;  // dtype: 0 fp32, 1 bf16
  std::uint64_t id;
  std::int64_t kv_heads, block, key_dim, value_dim, record_bytes;
  std::uint64_t checksum;  // of all before it
};
static_assert(sizeof(FileHeader) == 72);

struct RecordHead {
  std::uint64_t magic;
  std::int64_t record, block, head;
  std::uint64_t checksum;
};
static_assert(sizeof(RecordHead) == kRecordHeadBytes);

FileHeader header_of(const PageShape& s, std::uint64_t id) {
  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.dtype = s.dtype == DType::kBFloat16 ? 1 : 0;
  header.id = id;
  header.kv_heads = s.kv_heads;
  header.block = s.block;
  header.key_dim = s.key_dim;
  header.value_dim = s.value_dim;
  header.record_bytes = record_bytes(s);
  header.checksum = XXH3_64bits(&header, offsetof(FileHeader, checksum));
  return header;
}

std::string describe(const FileHeader& h) {
  return cat(h.kv_heads, " heads, blocks of ", h.block, ", keys of ", h.key_dim, ", values of ",
             h.value_dim, ", ", h.dtype == 1 ? "bf16" : "fp32");
}

std::uint64_t checksum_of(const RecordHead& head, std::span<const std::byte> page,
                          std::uint64_t id) {
  XXH3_state_t state = {};
  XXH3_64bits_reset_withSeed(&state, id);
  XXH3_64bits_update(&state, &head, offsetof(RecordHead, checksum));
  XXH3_64bits_update(&state, page.data(), page.size());
  return XXH3_64bits_digest(&state);
}

RecordHead head_in(std::span<const std::byte> record) {
  RecordHead head;
  std::memcpy(&head, record.data(), sizeof head);
  return head;
}

// False with errno set on an error, or with errno 0 at the end of the file.
bool read_at(int descriptor, std::int64_t offset, std::byte* to, std::int64_t bytes) {
  while (bytes > 0) {
    const ::ssize_t n = ::pread(descriptor, to, static_cast<std::size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) errno = 0;
    if (n <= 0) return false;
    to += n, offset += n, bytes -= n;
  }
  return true;
}

bool write_at(int descriptor, std::int64_t offset, const std::byte* from, std::int64_t bytes) {
  while (bytes > 0) {
    const ::ssize_t n = ::pwrite(descriptor, from, static_cast<std::size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    from += n, offset += n, bytes -= n;
  }
  return true;
}

Status failed(std::string_view what, const fs::path& path) {
  return io_error(path.string(), ": cannot ", what, ": ", std::strerror(errno));
}

// The name of a new file is durable only once its folder is.
void sync_folder(const fs::path& path) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

}  // namespace

Status validate(const PageShape& s) {
  constexpr std::int64_t kMost = std::int64_t{1} << 20;
  const auto within = [](std::int64_t x, std::int64_t least) { return x >= least && x <= kMost; };
  if (!within(s.kv_heads, 1) || !within(s.block, 2) || !within(s.key_dim, 1) ||
      !within(s.value_dim, 1))
    return invalid_argument("landmark pages: kv_heads ", s.kv_heads, ", block ", s.block,
                            ", key_dim ", s.key_dim, ", value_dim ", s.value_dim, "; each is 1 to ",
                            kMost, ", block at least 2");
  if (s.dtype != DType::kFloat32 && s.dtype != DType::kBFloat16)
    return unsupported("landmark pages: ", info(s.dtype).name, "; fp32 and bf16 are stored");
  if (s.page_bytes() > std::int64_t{1} << 30)
    return invalid_argument("landmark pages: a page of ", s.page_bytes(),
                            " bytes; at most 1 GiB. Use shorter blocks.");
  return {};
}

PageFile::PageFile(fs::path path, int descriptor, const PageShape& shape)
    : path_(std::move(path)),
      descriptor_(descriptor),
      shape_(shape),
      record_(static_cast<std::size_t>(record_bytes(shape))) {}

PageFile::PageFile(PageFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      shape_(other.shape_),
      id_(other.id_),
      records_(other.records_),
      released_(other.released_),
      cut_(other.cut_),
      record_(std::move(other.record_)) {}

PageFile::~PageFile() {
  if (descriptor_ >= 0) ::close(descriptor_);  // the lock goes with it
}

Result<PageFile> PageFile::open(const fs::path& path, const PageShape& shape) {
  EVERLONG_RETURN_IF_ERROR(validate(shape));
  const int descriptor = ::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
  if (descriptor < 0) return failed("open", path);
  PageFile file(path, descriptor, shape);
  if (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return failed("lock", path);
    return io_error(path.string(),
                    ": another program is writing these pages; "
                    "give each stream store a file of its own, or end the other one");
  }
  struct ::stat about {};
  if (::fstat(descriptor, &about) != 0) return failed("stat", path);
  if (!S_ISREG(about.st_mode)) return io_error(path.string(), ": is not a regular file");
  EVERLONG_RETURN_IF_ERROR(file.adopt(about.st_size));
  return file;
}

Status PageFile::adopt(std::int64_t size) {
  std::vector<std::byte> unit(kFileUnit);
  const std::int64_t there = std::min(size, kFileUnit);
  if (!read_at(descriptor_, 0, unit.data(), there)) return failed("read", path_);
  const auto same = static_cast<std::size_t>(std::min<std::int64_t>(there, sizeof kMagic));
  if (std::memcmp(unit.data(), kMagic, same) != 0)
    return corrupt(path_.string(), ": is not a page file; it was left as it is. Give another path");
  if (there < kFileUnit) return create();  // killed before its first record could exist
  FileHeader found;
  std::memcpy(&found, unit.data(), sizeof found);
  if (found.version != kVersion)
    return unsupported(path_.string(), ": page file of version ", found.version, "; this reads ",
                       kVersion);
  if (found.checksum != XXH3_64bits(&found, offsetof(FileHeader, checksum)))
    return corrupt(path_.string(), ": the header's checksum does not match its bytes");
  const FileHeader wanted = header_of(shape_, found.id);
  if (std::memcmp(&wanted, &found, sizeof found) != 0)
    return invalid_argument(path_.string(), ": holds pages of ", describe(found), "; here are ",
                            describe(wanted), ". Give another path");
  id_ = found.id;
  return cut_torn_end(size);
}

Status PageFile::create() {
  std::random_device source;
  id_ = (std::uint64_t{source()} << 32) | source();
  std::vector<std::byte> unit(kFileUnit);
  const FileHeader header = header_of(shape_, id_);
  std::memcpy(unit.data(), &header, sizeof header);
  if (!write_at(descriptor_, 0, unit.data(), kFileUnit) || ::fsync(descriptor_) != 0)
    return failed("write", path_);
  sync_folder(path_);
  return {};
}

// Only the end can be torn: records are written one after another. Holes at the end, released
// before, go with it.
Status PageFile::cut_torn_end(std::int64_t size) {
  const std::int64_t stride = record_bytes(shape_);
  records_ = (size - kFileUnit) / stride;
  while (records_ > 0) {
    if (!read_record(records_ - 1, stride)) return failed("read", path_);
    if (verify_record(records_ - 1).ok()) break;
    --records_;
  }
  cut_ = size - offset(records_);
  if (cut_ > 0 && ::ftruncate(descriptor_, offset(records_)) != 0) return failed("cut", path_);
  return {};
}

bool PageFile::read_record(std::int64_t record, std::int64_t bytes) {
  return read_at(descriptor_, offset(record), record_.data(), bytes);
}

Status PageFile::verify_record(std::int64_t record) const {
  const RecordHead head = head_in(record_);
  const auto page =
      std::span(record_).subspan(sizeof head, static_cast<std::size_t>(shape_.page_bytes()));
  if (head.magic == kRecordMagic && head.record == record &&
      head.checksum == checksum_of(head, page, id_))
    return {};
  return corrupt(path_.string(), ": record ", record, " (block ", head.block, ", head ", head.head,
                 ") is damaged: its bytes do not match its checksum");
}

Result<PageFile::Place> PageFile::append(std::int64_t block, std::int64_t head_index,
                                         std::span<const std::byte> page) {
  if (static_cast<std::int64_t>(page.size()) != shape_.page_bytes())
    return invalid_argument("landmark pages: ", page.size(), " bytes for a page of ",
                            shape_.page_bytes());
  RecordHead head{kRecordMagic, records_, block, head_index, 0};
  head.checksum = checksum_of(head, page, id_);
  std::memcpy(record_.data(), &head, sizeof head);
  std::memcpy(record_.data() + sizeof head, page.data(), page.size());
  std::fill(record_.begin() + static_cast<std::ptrdiff_t>(sizeof head + page.size()), record_.end(),
            std::byte{0});
  if (!write_at(descriptor_, offset(records_), record_.data(), record_bytes(shape_))) {
    const Status status = failed("write", path_);
    // Opening would cut it as well; now it would only take space on a disk that is full.
    if (::ftruncate(descriptor_, offset(records_)) != 0) return status;
    return status;
  }
  return Place{records_++, head.checksum};
}

Status PageFile::lost(std::int64_t record) const {
  return not_found(path_.string(), ": record ", record, " is not there; the file has ", records_,
                   " records, some released");
}

Status PageFile::check(const Place& place) {
  if (place.record < 0 || place.record >= records_) return lost(place.record);
  errno = 0;
  if (!read_record(place.record, kRecordHeadBytes))
    return errno != 0 ? failed("read", path_) : lost(place.record);
  const RecordHead head = head_in(record_);
  if (head.magic == 0 && head.checksum == 0) return lost(place.record);
  if (head.magic != kRecordMagic || head.record != place.record || head.checksum != place.checksum)
    return corrupt(path_.string(), ": record ", place.record,
                   " is not the one that was written there");
  return {};
}

Status PageFile::read(const Place& place, std::span<std::byte> page) {
  if (place.record < 0 || place.record >= records_) return lost(place.record);
  errno = 0;
  if (!read_record(place.record, kRecordHeadBytes + shape_.page_bytes()))
    return errno != 0 ? failed("read", path_) : lost(place.record);
  const RecordHead head = head_in(record_);
  if (head.magic == 0 && head.checksum == 0) return lost(place.record);
  EVERLONG_RETURN_IF_ERROR(verify_record(place.record));
  if (head.checksum != place.checksum)
    return corrupt(path_.string(), ": record ", place.record,
                   " is not the one that was written there");
  std::memcpy(page.data(), record_.data() + sizeof head, page.size());
  return {};
}

void PageFile::prefetch(std::int64_t record) const {
  ::posix_fadvise(descriptor_, offset(record), record_bytes(shape_), POSIX_FADV_WILLNEED);
}

void PageFile::release(std::int64_t record) {
  ++released_;
  const auto length = record_bytes(shape_);
  if (::fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset(record),
                  length) == 0)
    return;
  // Where holes cannot be punched the space stays taken, but the record still reads as released.
  const RecordHead none{};
  if (!write_at(descriptor_, offset(record), reinterpret_cast<const std::byte*>(&none),
                sizeof none))
    return;
}

void PageFile::release_others(const std::function<bool(std::int64_t record)>& owned) {
  released_ = 0;
  for (std::int64_t record = 0; record < records_; ++record) {
    if (owned(record)) continue;
    const bool there = read_record(record, kRecordHeadBytes);
    if (there && head_in(record_).magic == 0)
      ++released_;  // before
    else
      release(record);
  }
}

Status PageFile::sync() { return ::fdatasync(descriptor_) == 0 ? Status() : failed("sync", path_); }

}  // namespace everlong::landmark
