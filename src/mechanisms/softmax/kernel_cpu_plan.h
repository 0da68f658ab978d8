// How the CPU kernel cuts a call into units of work.
#pragma once
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/softmax/kernel.h"

namespace everlong::softmax {

using cpu::kTileKeys;
using cpu::kTileRows;
using cpu::MutableRows;
using cpu::Rows;

inline constexpr std::int64_t kAlign = 64;
// Backward: sequences times key heads are cut into at least so many pieces, each with a gradient of
// the queries of its own: enough for as many threads.
inline constexpr std::int64_t kPieces = 16;

inline std::int64_t aligned(std::int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
inline std::int64_t parts(std::int64_t all, std::int64_t size) { return (all + size - 1) / size; }

// Legend: as params.h. A tile is `tokens` tokens of `fold` query heads of one key head.
struct Plan {
  const KernelCall& call;
  std::int64_t B, T, S, H, G, fold, folds, tokens, sequences;

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
    sequences = c.offsets.empty() ? B : static_cast<std::int64_t>(c.offsets.size()) - 1;
  }
  cpu::SoftmaxShape shape() const {
    return {static_cast<int>(call.q.sizes[3]), static_cast<int>(call.v.sizes[3]),
            static_cast<float>(call.scale)};
  }
  std::int64_t first(std::int64_t n) const { return call.offsets.empty() ? 0 : call.offsets[n]; }
  std::int64_t row(std::int64_t n) const { return call.offsets.empty() ? n : 0; }
  std::int64_t length(std::int64_t n) const {
    return call.offsets.empty() ? T : call.offsets[n + 1] - call.offsets[n];
  }
  std::int64_t keys(std::int64_t n) const { return call.offsets.empty() ? S : length(n); }
  std::int64_t past(std::int64_t n) const { return keys(n) - length(n); }
  std::int64_t tiles(std::int64_t n) const { return parts(length(n), tokens); }
  std::int64_t key_tiles(std::int64_t n) const { return parts(keys(n), kTileKeys); }
  std::int64_t pieces() const {
    return std::clamp<std::int64_t>(kPieces / std::max<std::int64_t>(sequences * G, 1), 1, kPieces);
  }
  // Keys that the tokens [from, to) of sequence n see, between them.
  std::int64_t seen_begin(std::int64_t n, std::int64_t from) const {
    return call.window > 0 ? std::max<std::int64_t>(past(n) + from - call.window + 1, 0) : 0;
  }
  std::int64_t seen_end(std::int64_t n, std::int64_t to) const { return past(n) + to; }
};

// Units over the sequences before n, [sequences + 1], for `size` tiles a unit.
inline std::int64_t* count_units(const Plan& plan, std::int64_t size, std::byte*& next) {
  auto* sums = reinterpret_cast<std::int64_t*>(next);
  next += aligned((plan.sequences + 1) * 8);
  sums[0] = 0;
  for (std::int64_t n = 0; n < plan.sequences; ++n)
    sums[n + 1] = sums[n] + parts(plan.tiles(n), size);
  return sums;
}

// Some tiles of one head of one sequence. Units of a sequence: those of one head after those of
// another, so that its keys stay in the cache that threads share; from the last (the longest) to
// the first.
struct Unit {
  std::int64_t n, fold, tile_begin, tile_end;

  static Unit of(const Plan& plan, const std::int64_t* sums, std::int64_t size, std::int64_t unit) {
    const std::int64_t heads = plan.G * plan.folds;
    const std::int64_t n =
        std::upper_bound(sums, sums + plan.sequences + 1, unit / heads) - sums - 1;
    const std::int64_t within = unit - sums[n] * heads, units = sums[n + 1] - sums[n];
    const std::int64_t begin = (units - 1 - within % units) * size;
    return {n, within / units, begin, std::min(begin + size, plan.tiles(n))};
  }
};

// One tile of queries: where it lies.
struct Tile {
  std::int64_t n, tile, fold, token, count, head, rows;

  Tile(const Plan& plan, std::int64_t sequence, std::int64_t index, std::int64_t head_fold)
      : n(sequence),
        tile(index),
        fold(head_fold),
        token(index * plan.tokens),
        count(std::min(plan.tokens, plan.length(sequence) - token)),
        head(head_fold * plan.fold),
        rows(count * plan.fold) {}
};

template <class View, class Byte>
auto rows_of(const View& x, Byte* data, std::int64_t row, std::int64_t token, std::int64_t head,
             std::int64_t group) {
  const std::int64_t at = row * x.strides[0] + token * x.strides[1] + head * x.strides[2];
  using Void = decltype(x.data);
  return cpu::BasicRows<std::remove_pointer_t<Void>>{
      data + at * static_cast<std::int64_t>(info(x.dtype).bytes), x.dtype, x.strides[1],
      x.strides[2], group};
}

// Tokens of a tile in [B, T, H, D].
inline Rows tile_rows(const Plan& plan, const ConstTensorView& x, const Tile& t) {
  return rows_of(x, static_cast<const std::byte*>(x.data), plan.row(t.n), plan.first(t.n) + t.token,
                 t.head, plan.fold);
}
inline MutableRows tile_rows(const Plan& plan, const TensorView& x, const Tile& t) {
  return rows_of(x, static_cast<std::byte*>(x.data), plan.row(t.n), plan.first(t.n) + t.token,
                 t.head, plan.fold);
}

// Of lse [1, B, H, T] as rows of one number.
template <class View>
View transposed(const View& lse) {
  View x = lse;
  x.strides = {lse.strides[1], lse.strides[3], lse.strides[2], 1};
  return x;
}

inline Rows key_rows(const Plan& plan, const ConstTensorView& x, std::int64_t n, std::int64_t key,
                     std::int64_t head) {
  return rows_of(x, static_cast<const std::byte*>(x.data), plan.row(n), plan.first(n) + key, head,
                 1);
}
inline MutableRows key_rows(const Plan& plan, const TensorView& x, std::int64_t n, std::int64_t key,
                            std::int64_t head) {
  return rows_of(x, static_cast<std::byte*>(x.data), plan.row(n), plan.first(n) + key, head, 1);
}

// What the rows of a tile see, in keys from `key` on.
struct TileSight {
  std::int64_t begin[kTileRows], end[kTileRows];

  void set(const Plan& plan, const Tile& t, std::int64_t key) {
    for (std::int64_t r = 0; r < t.rows; ++r) {
      const std::int64_t token = t.token + r / plan.fold;
      begin[r] = plan.seen_begin(t.n, token) - key;
      end[r] = plan.seen_end(t.n, token + 1) - key;
    }
  }
  cpu::Sight view() const { return {begin, end}; }
};

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

inline Status check_workspace(std::span<std::byte> workspace, std::int64_t needed) {
  if (static_cast<std::int64_t>(workspace.size()) < needed ||
      reinterpret_cast<std::uintptr_t>(workspace.data()) % kAlign != 0)
    return invalid_argument("softmax: a workspace of ", workspace.size(), " bytes; ", needed,
                            " are needed, aligned to 64");
  return {};
}

}  // namespace everlong::softmax
