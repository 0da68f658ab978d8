// A run of neighbouring blocks of a stream: their landmark keys, value norms and page numbers.
// Shared by forks once it is full; only its first owner appends to it before.
#pragma once
#include <algorithm>
#include <cstring>

#include "mechanisms/landmark/kernel_pages.h"

namespace everlong::landmark {

struct BlockPages::Segment {
  Segment(std::shared_ptr<PageStore> store_in, std::int64_t capacity_in)
      : store(std::move(store_in)), capacity(capacity_in) {
    const PageShape& s = store->shape();
    keys.resize(static_cast<std::size_t>(s.kv_heads * capacity * s.key_dim * s.element()));
    norms.resize(static_cast<std::size_t>(s.kv_heads * capacity));
    pages.reserve(norms.size());
  }
  Segment& operator=(const Segment&) = delete;
  ~Segment() {
    for (const PageStore::Page page : owned()) store->release(page);
  }

  std::shared_ptr<Segment> copy() const {
    std::shared_ptr<Segment> other(new Segment(*this));
    other->pages.reserve(norms.size());
    for (const PageStore::Page page : owned()) store->retain(page);
    return other;
  }

  // For one block, each head, then add_pages; a restored stream starts with blocks that it lacks.
  void add_head(std::int64_t head, const std::byte* key, float norm_in) {
    const std::int64_t dim = store->shape().key_dim;
    const auto width = static_cast<std::size_t>(store->shape().element());
    std::byte* to = keys.data() + tile_offset(head, blocks / kTileBlocks);
    for (std::int64_t c = 0; c < dim; ++c)
      std::memcpy(to + static_cast<std::size_t>(c * kTileBlocks + blocks % kTileBlocks) * width,
                  key + static_cast<std::size_t>(c) * width, width);
    norms[static_cast<std::size_t>(head * capacity + blocks)] = norm_in;
  }
  void add_pages(std::span<const PageStore::Page> heads) {
    pages.insert(pages.end(), heads.begin(), heads.end());
    ++blocks;
  }
  void skip_blocks(std::int64_t count) {
    pages.resize(static_cast<std::size_t>(count * store->shape().kv_heads));
    blocks = absent = count;
  }

  // Pages of the blocks that are there, [block][head].
  std::span<const PageStore::Page> owned() const {
    return std::span(pages).subspan(static_cast<std::size_t>(absent * store->shape().kv_heads));
  }
  const std::byte* tile(std::int64_t head, std::int64_t index) const {
    return keys.data() + tile_offset(head, index);
  }
  float norm(std::int64_t at, std::int64_t head) const {
    return norms[static_cast<std::size_t>(head * capacity + at)];
  }
  PageStore::Page page(std::int64_t at, std::int64_t head) const {
    return pages[static_cast<std::size_t>(at * store->shape().kv_heads + head)];
  }
  std::int64_t bytes() const { return bytes_of(store->shape(), capacity); }
  static std::int64_t bytes_of(const PageShape& s, std::int64_t capacity) {
    // 64: what the allocator and the shared pointer add.
    return static_cast<std::int64_t>(sizeof(Segment)) + 64 +
           s.kv_heads * capacity * (s.key_dim * s.element() + 8);
  }

  std::shared_ptr<PageStore> store;
  std::int64_t capacity, blocks = 0, absent = 0;
  std::vector<std::byte> keys;         // [G][capacity / 16][K][16]
  std::vector<float> norms;            // [G][capacity]
  std::vector<PageStore::Page> pages;  // [blocks][G]

 private:
  Segment(const Segment&) = default;
  std::ptrdiff_t tile_offset(std::int64_t head, std::int64_t index) const {
    const PageShape& s = store->shape();
    return (head * capacity + index * kTileBlocks) * s.key_dim * s.element();
  }
};

}  // namespace everlong::landmark
