// How the CPU kernel cuts a call into tiles of queries, and what a tile's rows see of a section.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <type_traits>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/landmark/kernel.h"

namespace everlong::landmark {

using cpu::kTileRows;
using cpu::MutableRows;
using cpu::Rows;

inline std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }
inline std::int64_t parts(std::int64_t all, std::int64_t size) { return (all + size - 1) / size; }

// Legend: as params.h. A tile is `tokens` tokens of `fold` query heads of one key head.
struct Plan {
  const KernelCall& call;
  std::int64_t B, T, S, H, G, fold, folds, tokens;

  explicit Plan(const KernelCall& c)
      : call(c),
        B(c.q.sizes[0]),
        T(c.q.sizes[1]),
        S(c.k.sizes[1]),
        H(c.q.sizes[2]),
        G(c.k.sizes[2]) {
    fold = H / G <= kTileRows ? H / G : 1;
    folds = H / G / fold;
    tokens = kTileRows / fold;
  }
  cpu::SoftmaxShape shape() const {
    return {static_cast<int>(call.q.sizes[3]), static_cast<int>(call.v.sizes[3]),
            static_cast<float>(call.scale)};
  }
  int key_dim() const { return static_cast<int>(call.q.sizes[3]); }
  int value_dim() const { return static_cast<int>(call.v.sizes[3]); }
  std::int64_t tiles() const { return parts(T, tokens); }
  std::span<const Section> sections(std::int64_t b) const {
    const auto first = static_cast<std::size_t>(call.first_section[static_cast<std::size_t>(b)]);
    const auto end = static_cast<std::size_t>(call.first_section[static_cast<std::size_t>(b) + 1]);
    return call.sections.subspan(first, end - first);
  }
  std::int64_t most_sections() const {
    std::int64_t most = 0;
    for (std::int64_t b = 0; b < B; ++b)
      most = std::max(most, static_cast<std::int64_t>(sections(b).size()));
    return most;
  }
};

// One tile of queries: where it lies, and the key positions of its first and last token.
struct Tile {
  std::int64_t b, token, count, head, rows, first, last, fold;

  Tile(const Plan& plan, std::int64_t row, std::int64_t index, std::int64_t head_fold)
      : b(row),
        token(index * plan.tokens),
        count(std::min(plan.tokens, plan.T - token)),
        head(head_fold * plan.fold),
        rows(count * plan.fold),
        first(plan.S - plan.T + token),
        last(first + count - 1),
        fold(plan.fold) {}
  std::int64_t position(std::int64_t r) const { return first + r / fold; }
  // Sections that any row sees.
  std::int64_t seen(std::span<const Section> sections) const {
    return std::ranges::upper_bound(sections, last, {}, &Section::begin) - sections.begin();
  }
};

template <class View, class Byte>
auto rows_of(const View& x, Byte* data, std::int64_t b, std::int64_t token, std::int64_t head,
             std::int64_t group) {
  const std::int64_t at = b * x.strides[0] + token * x.strides[1] + head * x.strides[2];
  using Void = decltype(x.data);
  return cpu::BasicRows<std::remove_pointer_t<Void>>{
      data + at * static_cast<std::int64_t>(info(x.dtype).bytes), x.dtype, x.strides[1],
      x.strides[2], group};
}

// Tokens of a tile in [B, T, H, D].
inline Rows tile_rows(const ConstTensorView& x, const Tile& t) {
  return rows_of(x, static_cast<const std::byte*>(x.data), t.b, t.token, t.head, t.fold);
}
inline MutableRows tile_rows(const TensorView& x, const Tile& t) {
  return rows_of(x, static_cast<std::byte*>(x.data), t.b, t.token, t.head, t.fold);
}
// Of lse [1, B, H, T] as rows of one number.
template <class View>
View transposed(const View& lse) {
  View x = lse;
  x.strides = {lse.strides[1], lse.strides[3], lse.strides[2], 1};
  return x;
}
inline Rows key_rows(const ConstTensorView& x, std::int64_t b, std::int64_t key,
                     std::int64_t head) {
  return rows_of(x, static_cast<const std::byte*>(x.data), b, key, head, 1);
}

// What a tile's rows see of a section: the keys before themselves.
struct SectionSight {
  std::int64_t begin[kTileRows], end[kTileRows];

  void set(const Tile& t, std::int64_t first_key) {
    for (std::int64_t r = 0; r < t.rows; ++r) {
      begin[r] = 0;
      end[r] = t.position(r) + 1 - first_key;
    }
  }
  cpu::Sight view() const { return {begin, end}; }
};

// A closed section is past for the rows behind its landmark.
inline bool is_past(const Section& section, std::int64_t position) {
  return section.closed && section.end < position;
}

// Every thread takes the next unit when it is free: units differ in size.
template <class Work>
void spread(const Executor& executor, std::int64_t units, const Work& work) {
  std::atomic<std::int64_t> next = 0;
  executor.run(std::min<std::int64_t>(executor.threads(), units), [&](std::int64_t, int thread) {
    for (;;) {
      const std::int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units) return;
      work(unit, thread);
    }
  });
}

// Hands out parts of a workspace.
class Arena {
 public:
  explicit Arena(std::byte* base) : next_(base) {}
  float* floats(std::int64_t count) {
    auto* mine = reinterpret_cast<float*>(next_);
    next_ += aligned(count * static_cast<std::int64_t>(sizeof(float)));
    return mine;
  }
  std::byte* bytes(std::int64_t count) {
    std::byte* mine = next_;
    next_ += aligned(count);
    return mine;
  }
  // Arenas at null measure.
  std::int64_t used() const { return reinterpret_cast<std::intptr_t>(next_); }

 private:
  std::byte* next_;
};

inline Status check_workspace(std::span<std::byte> workspace, std::int64_t needed) {
  if (static_cast<std::int64_t>(workspace.size()) < needed ||
      reinterpret_cast<std::uintptr_t>(workspace.data()) % 64 != 0)
    return invalid_argument("landmark: a workspace of ", workspace.size(), " bytes; ", needed,
                            " are needed, aligned to 64");
  return {};
}

}  // namespace everlong::landmark
