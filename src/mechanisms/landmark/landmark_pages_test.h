// Blocks of known content for the tests of the block memory: any block can be made again and
// compared.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/random.h"
#include "mechanisms/landmark/kernel_pages.h"

namespace everlong::landmark {

struct TestBlock {
  std::vector<std::byte> k, v;  // [G, L, K], [G, L, V]

  TestBlock(const PageShape& s, std::uint64_t seed, std::int64_t number)
      : k(static_cast<std::size_t>(s.kv_heads * s.block * s.key_dim * s.element())),
        v(static_cast<std::size_t>(s.kv_heads * s.block * s.value_dim * s.element())),
        shape(s) {
    Random random{mixed_seed({seed, static_cast<std::uint64_t>(number)})};
    for (auto* bytes : {&k, &v})
      for (std::size_t i = 0; i < bytes->size(); i += static_cast<std::size_t>(s.element())) {
        // Sums of small integers are exact in any order, in fp32 and bf16.
        const auto value = static_cast<float>(random.between(-8, 8)) / 4;
        const auto bits = std::bit_cast<std::uint32_t>(value);
        const std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
        if (s.element() == 4)
          std::memcpy(bytes->data() + i, &bits, 4);
        else
          std::memcpy(bytes->data() + i, &half, 2);
      }
  }

  static ConstTensorView view(const PageShape& s, const std::vector<std::byte>& x,
                              std::int64_t dim) {
    return {x.data(), s.dtype, {1, s.kv_heads, s.block, dim}, {0, s.block * dim, dim, 1}};
  }
  Status append_to(BlockPages& pages) const {
    return pages.append(view(shape, k, shape.key_dim), view(shape, v, shape.value_dim));
  }
  float key(std::int64_t head, std::int64_t row, std::int64_t i) const {
    return number(k, (head * shape.block + row) * shape.key_dim + i);
  }
  float value(std::int64_t head, std::int64_t row, std::int64_t i) const {
    return number(v, (head * shape.block + row) * shape.value_dim + i);
  }
  float number(const std::vector<std::byte>& x, std::int64_t i) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, x.data() + i * shape.element(), static_cast<std::size_t>(shape.element()));
    return std::bit_cast<float>(shape.element() == 4 ? bits : bits << 16);
  }
  // The page that one head's ordinary tokens make.
  std::vector<std::byte> page(std::int64_t head) const {
    std::vector<std::byte> bytes;
    for (const auto& [x, dim] : {std::pair{&k, shape.key_dim}, {&v, shape.value_dim}}) {
      const auto start = x->begin() + head * shape.block * dim * shape.element();
      bytes.insert(bytes.end(), start, start + shape.tokens() * dim * shape.element());
    }
    return bytes;
  }

  PageShape shape;
};

inline std::shared_ptr<PageStore> open_store(const PageShape& shape, std::int64_t pages_in_ram,
                                             const fs::path& file = {}) {
  auto store =
      PageStore::open(shape, {.ram_bytes = pages_in_ram * shape.page_bytes(), .file = file});
  EXPECT_TRUE(store.ok()) << store.status().message();
  return store.ok() ? *store : nullptr;
}

// "" when the block is what TestBlock makes, key, values, norm and landmark; else what is wrong.
inline std::string compare_block(const BlockPages& pages, std::uint64_t seed, std::int64_t block) {
  const PageShape& s = pages.shape();
  const TestBlock wanted(s, seed, block);
  std::vector<float> landmark(static_cast<std::size_t>(s.key_dim));
  for (std::int64_t g = 0; g < s.kv_heads; ++g) {
    const auto pinned = pages.read(block, g, 0.5);
    if (!pinned.ok()) return pinned.status().message();
    if (!std::ranges::equal(pinned->bytes(), wanted.page(g)))
      return cat("block ", block, ", head ", g, ": other bytes");
    if (const Status status = pages.landmark(block, g, landmark); !status.ok())
      return status.message();
    for (std::int64_t i = 0; i < s.key_dim; ++i)
      if (landmark[static_cast<std::size_t>(i)] != wanted.key(g, s.tokens(), i))
        return cat("block ", block, ", head ", g, ": another landmark");
  }
  return "";
}

struct TestFolder {
  fs::path path;
  TestFolder() {
    std::string name = (fs::temp_directory_path() / "everlong_pages_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~TestFolder() { fs::remove_all(path); }
  fs::path operator/(const char* name) const { return path / name; }
};

}  // namespace everlong::landmark
