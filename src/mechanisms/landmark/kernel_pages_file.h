// The file that pages of blocks are spilled to: append-only records of one size, each with a
// checksum. docs/formats.md, "Page file".
//
// What a crash can do: kill -9 at any moment leaves every whole record in place, and at most one
// torn record at the end. Opening cuts what is torn. Appending does not sync; sync() does, and what
// was appended before it then survives the loss of power as well.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/files.h"

namespace everlong::landmark {

// A page is what one key/value head stores of one complete block: the keys of its ordinary tokens
// [L - 1, K], then their values [L - 1, V], C order. The landmark's key is in memory and its value
// is never read (README.md, section 3), so neither is here.
struct PageShape {
  std::int64_t kv_heads = 1, block = 64, key_dim = 1, value_dim = 1;  // block: L, landmark included
  DType dtype = DType::kFloat32;                                      // or kBFloat16

  std::int64_t tokens() const { return block - 1; }
  std::int64_t element() const { return static_cast<std::int64_t>(info(dtype).bytes); }
  std::int64_t key_bytes() const { return tokens() * key_dim * element(); }
  std::int64_t page_bytes() const { return tokens() * (key_dim + value_dim) * element(); }
  bool operator==(const PageShape&) const = default;
};
Status validate(const PageShape& shape);

inline constexpr std::int64_t kFileUnit = 4096;       // what file systems store and punch
inline constexpr std::int64_t kRecordHeadBytes = 40;  // before the page in its record

// Bytes of a record: head and page, rounded up to kFileUnit. The file's header takes one unit.
inline std::int64_t record_bytes(const PageShape& shape) {
  return (kRecordHeadBytes + shape.page_bytes() + kFileUnit - 1) / kFileUnit * kFileUnit;
}

// Not thread safe. At most one writer a file, over all processes: a lock that ends with the process
// refuses a second one.
class PageFile {
 public:
  struct Place {
    std::int64_t record = -1;    // counts from 0; -1: nowhere
    std::uint64_t checksum = 0;  // of number, place in the text and page, seeded by the file
  };

  // Opens or makes the file. kInvalidArgument for another shape, kCorrupt for bytes that are no
  // page file (they are left alone), kIo when another writer holds it.
  static Result<PageFile> open(const fs::path& path, const PageShape& shape);
  PageFile(PageFile&& other) noexcept;
  PageFile& operator=(PageFile&&) = delete;
  ~PageFile();

  // A failure (a full disk) leaves the file as it was.
  Result<Place> append(std::int64_t block, std::int64_t head, std::span<const std::byte> page);
  // page: page_bytes(). kNotFound for a record that the file no longer has, kCorrupt for one whose
  // bytes are not those that were written; then page holds nothing of use.
  Status read(const Place& place, std::span<std::byte> page);
  // The same for the head alone: is the record there, and the one that is meant?
  Status check(const Place& place);
  // Asks the system to read ahead; returns at once.
  void prefetch(std::int64_t record) const;
  // Gives the record's space back to the file system. Reading it is kNotFound from then on.
  void release(std::int64_t record);
  // The same for every record that is not owned; bytes() then counts the owned ones.
  void release_others(const std::function<bool(std::int64_t record)>& owned);
  Status sync();

  std::int64_t records() const { return records_; }  // ever appended, released ones included
  // Space in use: the header and the records not released in this opening; the file's length is
  // larger by the holes that were given back.
  std::int64_t bytes() const { return kFileUnit + (records_ - released_) * record_bytes(shape_); }
  std::uint64_t id() const { return id_; }         // random, made with the file
  std::int64_t cut_bytes() const { return cut_; }  // that opening found torn and cut
  const fs::path& path() const { return path_; }

 private:
  PageFile(fs::path path, int descriptor, const PageShape& shape);
  Status create();
  Status adopt(std::int64_t size);
  Status cut_torn_end(std::int64_t size);
  std::int64_t offset(std::int64_t record) const {
    return kFileUnit + record * record_bytes(shape_);
  }
  bool read_record(std::int64_t record, std::int64_t bytes);  // into record_; as read_at
  Status verify_record(std::int64_t record) const;
  Status lost(std::int64_t record) const;

  fs::path path_;
  int descriptor_ = -1;
  PageShape shape_;
  std::uint64_t id_ = 0;
  std::int64_t records_ = 0, released_ = 0, cut_ = 0;
  std::vector<std::byte> record_;  // one record, for reading and writing
};

}  // namespace everlong::landmark
