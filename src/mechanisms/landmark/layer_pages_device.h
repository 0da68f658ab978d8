// The tier above the pages for layers on a GPU: landmark keys and the weightiest pages in its
// memory, all pages behind them in memory and file of the host (kernel_pages.h).
#pragma once
#include <set>
#include <unordered_map>

#include "mechanisms/landmark/layer_pages_past.h"

namespace everlong::landmark {

// Copies of pages in device memory under a byte budget; pages are immutable, so a copy is never
// written back. The weightiest by gate mass stay. Not thread safe: one state's own.
class DevicePool {
 public:
  struct Want {
    std::int64_t block = 0, head = 0;
    double mass = 0;
  };

  DevicePool(const PageShape& shape, const at::TensorOptions& options, std::int64_t bytes);

  std::int64_t slots() const { return slots_; }  // at most
  // The slots of distinct pages of one line (a sequence's number), at most slots() of them; what is
  // absent is read from the host's tiers and copied, all of it in one transfer. The caller's stream
  // must have finished with what earlier calls returned.
  std::vector<std::int64_t> take(std::int64_t line, const BlockPages& pages,
                                 std::span<const Want> wants);
  at::Tensor keys() const;    // [slots so far, L - 1, K]
  at::Tensor values() const;  // [slots so far, L - 1, V]

  void clear();
  std::int64_t bytes() const;  // of the pool and of the buffer that copies go through
  std::int64_t hits() const { return hits_; }
  std::int64_t misses() const { return misses_; }

 private:
  struct Key {
    std::int64_t line, block, head;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const {
      std::uint64_t x = static_cast<std::uint64_t>(key.block);
      for (const std::int64_t part : {key.head, key.line})
        x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(part);
      return static_cast<std::size_t>(x ^ (x >> 29));
    }
  };
  struct Slot {
    Key key;
    double weight = 0;
  };
  std::int64_t room_for_one();  // the number of a slot that may be overwritten

  PageShape shape_;
  at::TensorOptions options_;
  std::int64_t slots_ = 0;
  at::Tensor pool_;     // [slots so far, elements of a page]
  at::Tensor staging_;  // on the host, pinned
  std::unordered_map<Key, std::int64_t, Hash> where_;
  std::vector<Slot> held_;
  std::set<std::pair<double, std::int64_t>> by_weight_;
  GateWeights weights_;
  std::int64_t hits_ = 0, misses_ = 0;
};

// Landmark keys of one sequence on the device, growing; blocks from first() on.
class DeviceLandmarks {
 public:
  DeviceLandmarks() = default;
  explicit DeviceLandmarks(std::int64_t first) : first_(first), end_(first) {}
  void append(const at::Tensor& keys_GcK);
  // Blocks before `block` will not be asked for again.
  void drop_before(std::int64_t block) { first_kept_ = std::max(first_kept_, block); }
  at::Tensor keys(std::int64_t begin, std::int64_t end) const {  // [G, end - begin, K]
    return rows_.narrow(1, begin - first_, end - begin);
  }
  DeviceLandmarks fork() const;
  std::int64_t bytes() const {
    return rows_.defined() ? static_cast<std::int64_t>(rows_.nbytes()) : 0;
  }
  // Most bytes with `kept` blocks of the past, of so many appended.
  static std::int64_t bytes_bound(const PageShape& shape, std::int64_t kept, std::int64_t blocks);

 private:
  static constexpr std::int64_t kLeast = 64;  // blocks
  at::Tensor rows_;                           // [G, room, K]
  std::int64_t first_ = 0, end_ = 0, first_kept_ = 0;
};

class DevicePast final : public PastReader {
 public:
  DevicePast(const BlockPages& pages, const DeviceLandmarks& landmarks, DevicePool& pool,
             std::int64_t line)
      : pages_(pages), landmarks_(landmarks), pool_(pool), line_(line) {}
  PastRead read(const PastQueries& queries) const override;

 private:
  at::Tensor pick(const PastQueries& queries) const;  // [G, n, P]
  std::int64_t rows_that_fit(const std::int64_t* block_GnP, std::int64_t from, std::int64_t G,
                             std::int64_t n, std::int64_t P) const;
  void read_rows(const at::Tensor& q_GnPK, const at::Tensor& slots_GnP, double scale,
                 const at::Tensor& out_GnPV) const;

  const BlockPages& pages_;
  const DeviceLandmarks& landmarks_;
  DevicePool& pool_;
  std::int64_t line_ = 0;
};

}  // namespace everlong::landmark
