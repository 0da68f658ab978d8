// The block memory of one stream through one layer: landmark keys in memory, blocks as pages in
// tiers. Torch-free. Spec: Landmark Attention (2305.16300), section 3.2 and appendix G (blocks kept
// away from the fast memory, landmark keys in it); README.md of this room, section 3.
//
//   append(k, v)          a complete block: L keys (turned to their place in the block), L values
//   search(head, scans)   each query's best k landmarks, exactly, by the room's rule on equal
//   scores read(block, head)     the keys and values of its ordinary tokens save, restore with the
//   store's file, so that kill -9 loses nothing that was saved
//
// Blocks are numbered from the start of the text; [first(), end()) are kept.
#pragma once
#include "core/tensor_view.h"
#include "mechanisms/landmark/kernel_pages_store.h"
#include "mechanisms/landmark/kernel_search.h"

namespace everlong::landmark {

// Not thread safe; distinct streams, forks too, may be used by distinct threads over one store.
//
// Forks. Blocks lie in segments of segment_blocks(); a full one never changes and is shared by all
// forks (one pointer each), the last is copied when a fork is made: its keys and page numbers,
// never the pages, which are immutable and shared too. So a fork costs less than one segment and 16
// bytes a segment before it, and neither side ever sees what the other appends or drops.
class BlockPages {
 public:
  // max_blocks > 0: of the past, only the newest are kept, and older ones given back a segment at a
  // time. 0: everything is kept. The first block appended has the number `first`.
  BlockPages(std::shared_ptr<PageStore> store, std::int64_t max_blocks, std::int64_t first = 0);
  BlockPages(BlockPages&&) = default;
  BlockPages& operator=(BlockPages&&) = default;
  ~BlockPages();

  BlockPages fork() const;

  const PageShape& shape() const { return store_->shape(); }
  const std::shared_ptr<PageStore>& store() const { return store_; }
  std::int64_t first() const { return first_; }
  std::int64_t end() const { return end_; }

  // k [1, G, L, K], v [1, G, L, V] of the page's dtype, last stride 1. Row L - 1 of k is the
  // landmark's key; row L - 1 of v is not read. Refuses other shapes and dtypes; on any failure the
  // stream is as it was.
  Status append(const ConstTensorView& k_GLK, const ConstTensorView& v_GLV);

  // For each of `queries` queries the `count` best landmarks of the scans, rising by block. Reads
  // every landmark named once: `element * K` bytes each. Refuses blocks that are not kept.
  Status search(std::int64_t head, std::span<const Scan> scans, std::int64_t queries, double scale,
                std::int64_t count, std::vector<std::vector<Pick>>& picks) const;
  // scale q . landmark of one query for blocks [begin, end), as search compares them before it
  // rounds.
  Status scores(std::int64_t head, const Scan& scan, double scale, std::span<float> out) const;
  // The landmark's key [K] as fp32, and the largest 2-norm of the block's values (rounded up).
  Status landmark(std::int64_t block, std::int64_t head, std::span<float> out) const;
  Result<float> value_norm(std::int64_t block, std::int64_t head) const;

  // `mass`: the gate that the reader gives the block, for what stays in memory. kNotFound for a
  // block that is not kept; PageStore::pin for the rest.
  Result<PinnedPage> read(std::int64_t block, std::int64_t head, double mass) const;
  // Asks for pages ahead of time, e.g. the previous token's picks. Blocks not kept are passed over.
  void prefetch(std::int64_t head, std::span<const Pick> picks) const;

  // Writes pages that are not in the store's file yet, syncs it, then writes the state file at
  // `path` in one step: landmark keys, places and checksums of pages, and `extra` (the caller's
  // bytes, e.g. of the incomplete block). Whatever ends the program, the last save that returned Ok
  // can be restored, until the next save of this stream (to any path) has returned Ok: blocks that
  // max_blocks drops in between keep their place in the file. Needs a store with a file.
  Status save(const fs::path& path, std::span<const std::byte> extra = {});
  // Checks the whole state file, that it belongs to the store's file, and that every page is there
  // (by its record's head; its bytes are checked when read). kNotFound and kCorrupt name the block.
  // Two restored streams of one state share their pages, like forks.
  static Result<BlockPages> restore(const std::shared_ptr<PageStore>& store, const fs::path& path,
                                    std::int64_t max_blocks, std::vector<std::byte>* extra);

  // Memory of this stream outside the store (forks count shared segments in full), and its bound
  // after `blocks` blocks. Per block and head: element * K + 8 bytes, rounded up to segments.
  std::int64_t resident_bytes() const;
  static std::int64_t resident_bound(const PageShape& shape, std::int64_t max_blocks,
                                     std::int64_t blocks, std::int64_t between = 0);
  // Most pages alive through a stream of so many blocks, for PageStore's bounds. Blocks that were
  // dropped since the last save still count: at most `between` are appended between two saves (0:
  // it is never saved).
  static std::int64_t pages_bound(const PageShape& shape, std::int64_t max_blocks,
                                  std::int64_t blocks, std::int64_t between = 0);
  // Blocks that are given back together: 256, fewer for small max_blocks.
  static std::int64_t segment_blocks(std::int64_t max_blocks);

 private:
  struct Segment;
  using Segments = std::vector<std::shared_ptr<Segment>>;
  const Segment& segment_of(std::int64_t block) const;
  Status check_kept(std::int64_t begin, std::int64_t end) const;
  Status check_head(std::int64_t head) const;
  Segment& open_segment();  // that takes block end_
  void mark_saved(const Segments& segments, bool saved);
  Segments snapshot() const;  // shares what is full, copies the last
  void drop_old();
  static std::int64_t kept_bound(std::int64_t max_blocks, std::int64_t blocks,
                                 std::int64_t between);
  template <class Visit>
  void visit_segments(std::int64_t head, const Scan& scan, const Visit& visit) const;

  std::shared_ptr<PageStore> store_;
  std::int64_t max_blocks_ = 0, per_segment_ = 0;
  std::int64_t first_ = 0, end_ = 0;
  std::int64_t first_segment_ = 0;  // number of segments_[0]; segment s starts at s * per_segment_
  Segments segments_;
  Segments saved_;  // what the last saved state names
};

}  // namespace everlong::landmark
