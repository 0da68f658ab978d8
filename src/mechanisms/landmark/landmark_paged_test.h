// A text fed in pieces to memories of the layer, in tiers and plain.
#pragma once
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "core/random.h"
#include "mechanisms/landmark/layer_pages.h"

namespace everlong::landmark {

struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "everlong_paged_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
};

struct Case {
  Retrieval retrieval{.block = 5, .top_k = 3};
  std::int64_t batch = 1, heads = 4, kv_heads = 2;
  at::ScalarType dtype = at::kFloat;
  std::string rope = "half";
  at::Device device = at::kCPU;
  std::int64_t pool = 0;  // pages on the device; 0: read where they lie

  MemoryShape shape() const { return {kv_heads, 8, 6, retrieval}; }
  at::TensorOptions options() const { return at::TensorOptions().dtype(dtype).device(device); }
  Reader reader() const {
    Reader r;
    r.retrieval = retrieval;
    r.scale = 0.4;
    if (rope != "none") r.frequencies = rope_frequencies(10000, 8);
    return r;
  }
  std::int64_t page_bytes() const {
    return (retrieval.block - 1) * (8 + 6) * (dtype == at::kFloat ? 4 : 2);
  }
  // `pages` of them in memory, the rest in a file.
  std::unique_ptr<PagedMemory> paged(const Folder& folder, std::int64_t pages,
                                     const char* name = "pages") const {
    auto made = PagedMemory::create(
        batch, shape(), options(), {pages * page_bytes(), folder.path / name}, pool * page_bytes());
    EXPECT_TRUE(made.ok()) << made.status().message();
    return made.ok() ? *std::move(made) : nullptr;
  }
};

struct Text {
  at::Tensor q, k, v;
  Text(const Case& c, std::int64_t tokens) {
    auto generator = at::detail::createCPUGenerator(9);
    const auto draw = [&](std::int64_t heads, std::int64_t dim) {
      return at::randn({c.batch, tokens, heads, dim}, generator).to(c.dtype).to(c.device);
    };
    q = draw(c.heads, 8) * 2;
    k = draw(c.kv_heads, 8);
    v = draw(c.kv_heads, 6);
  }
};

// Pieces that cut blocks anywhere: single tokens, parts, several blocks.
inline std::vector<std::int64_t> cuts(std::int64_t tokens, std::uint64_t seed) {
  Random random{seed};
  std::vector<std::int64_t> pieces;
  while (tokens > 0) {
    pieces.push_back(std::min(tokens, random.share() < 0.5 ? 1 : random.between(1, 23)));
    tokens -= pieces.back();
  }
  return pieces;
}

template <class Memory>
Read feed(Memory& memory, const Case& c, const Text& text, std::int64_t begin, std::int64_t end,
          const std::vector<std::int64_t>& pieces) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> outs, picks;
  for (const std::int64_t piece : pieces) {
    const std::int64_t count = std::min(piece, end - begin);
    if (count == 0) break;
    const auto part = [&](const at::Tensor& x) { return x.narrow(1, begin, count); };
    const Read read = memory.attend(part(text.q), part(text.k), part(text.v), {}, c.reader(), true);
    outs.push_back(read.out);
    picks.push_back(read.selected);
    begin += count;
  }
  return {at::cat(outs, 1), at::cat(picks, 1)};
}

inline double largest(const at::Tensor& x) { return x.abs().max().to(at::kDouble).item<double>(); }

// Ways of reading: windows, few blocks, tokens or heads that decide together, chunks, no rotation,
// bf16.
inline std::vector<Case> all_cases() {
  std::vector<Case> cases(7);
  cases[1].retrieval.window = 2;
  cases[2].retrieval.max_blocks = 6;
  cases[2].batch = 2;
  cases[3].retrieval = {.block = 4,
                        .top_k = 2,
                        .window = 1,
                        .granularity = Granularity::kTokenMaxOverHeads,
                        .max_blocks = 5};
  cases[4].retrieval = {
      .block = 5, .top_k = 2, .chunked = true, .granularity = Granularity::kHeadMaxOverTokens};
  cases[5].retrieval.chunked = true;
  cases[5].rope = "none";
  cases[6].dtype = at::kBFloat16;
  return cases;
}

}  // namespace everlong::landmark
