// How the CPU kernel reads the rows of a piece.
#pragma once
#include <type_traits>

#include "kernels/cpu/softmax_block.h"
#include "kernels/cpu/spread.h"
#include "mechanisms/longnet/kernel.h"

namespace everlong::longnet {

using cpu::kTileKeys;
using cpu::kTileRows;

inline std::int64_t parts(std::int64_t all, std::int64_t size) { return (all + size - 1) / size; }

struct Plan {
  const KernelCall& call;
  std::int64_t B, T, H, G, group;
  std::int64_t fold;    // query heads of a key head in one tile
  std::int64_t folds;   // tiles a key head's query heads take
  std::int64_t tokens;  // lattice rows of a tile

  explicit Plan(const KernelCall& c)
      : call(c), B(c.q.sizes[0]), T(c.q.sizes[1]), H(c.q.sizes[2]), G(c.k.sizes[2]), group(H / G) {
    fold = group <= kTileRows ? group : 1;
    folds = group / fold;
    tokens = kTileRows / fold;
  }
  cpu::SoftmaxShape shape() const {
    return {static_cast<int>(call.q.sizes[3]), static_cast<int>(call.v.sizes[3]),
            static_cast<float>(call.scale)};
  }
};

// One segment of a piece for one batch row and key/value head.
struct Place {
  std::int64_t row, head, segment;

  // Units of a piece are numbered (row, head of the class, segment).
  static Place of(const KernelPiece& piece, std::int64_t unit) {
    const std::int64_t segments = piece.run.segments;
    const std::int64_t heads = unit / segments;
    return {heads / piece.heads.count,
            piece.heads.first + heads % piece.heads.count * piece.heads.step, unit % segments};
  }
};
inline std::int64_t units_of(const Plan& plan, const KernelPiece& piece) {
  return plan.B * piece.heads.count * piece.run.segments;
}

template <class View>
auto rows_at(const View& x, std::int64_t offset, std::int64_t outer, std::int64_t inner,
             std::int64_t group) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(x.data)>>,
                                  const std::byte, std::byte>;
  using Void = std::remove_pointer_t<decltype(x.data)>;
  return cpu::BasicRows<Void>{
      static_cast<Byte*>(x.data) + offset * static_cast<std::int64_t>(info(x.dtype).bytes), x.dtype,
      outer, inner, group};
}

// Query rows (l, head of the fold) of x [B, T, H, D] from lattice query `first` of the piece on.
template <class View>
auto query_rows(const Plan& plan, const KernelPiece& piece, const Place& place, const View& x,
                std::int64_t first, std::int64_t fold) {
  const LatticeRun& run = piece.run;
  const std::int64_t token = run.key_token + place.segment * piece.segment +
                             (run.keys - run.queries + first) * piece.ratio;
  const std::int64_t head = place.head * plan.group + fold * plan.fold;
  return rows_at(x, place.row * x.strides[0] + token * x.strides[1] + head * x.strides[2],
                 piece.ratio * x.strides[1], x.strides[2], plan.fold);
}

// Rows of x [B, T, G, D] from the piece's key `first` of the call on.
template <class View>
auto key_rows(const KernelPiece& piece, const Place& place, const View& x, std::int64_t first) {
  const std::int64_t token =
      piece.run.key_token + place.segment * piece.segment + first * piece.ratio;
  return rows_at(x, place.row * x.strides[0] + token * x.strides[1] + place.head * x.strides[2],
                 piece.ratio * x.strides[1], 0, 1);
}

// Rows of a buffer [B, G, C, D] from row `first` on.
template <class View>
auto past_rows(const Place& place, const View& x, std::int64_t first) {
  return rows_at(x, place.row * x.strides[0] + place.head * x.strides[1] + first * x.strides[2],
                 x.strides[2], 0, 1);
}

// What the rows of a tile see, in keys from `key` on. Key 0 is the first row of the buffer.
struct TileSight {
  std::int64_t begin[kTileRows], end[kTileRows];

  void set(const Plan& plan, const LatticeRun& run, std::int64_t query, std::int64_t rows,
           std::int64_t key) {
    const std::int64_t place = run.all_keys() - run.queries + query;
    for (std::int64_t r = 0; r < rows; ++r) {
      begin[r] = 0;
      end[r] = (plan.call.causal ? place + r / plan.fold + 1 : run.all_keys()) - key;
    }
  }
  cpu::Sight view() const { return {begin, end}; }
};

}  // namespace everlong::longnet
