// Reading blocks of the past: which ones a token picks, and its attention over them and over what
// is local. README.md, section 3.
#pragma once
#include <optional>
#include <vector>

#include "mechanisms/landmark/op.h"
#include "mechanisms/landmark/params.h"
#include "ops/rope.h"

namespace everlong::landmark {

struct Reader {
  Retrieval retrieval;
  double scale = 1;
  std::vector<double> frequencies;  // none: positions have no effect
  RopePairs pairs = RopePairs::kHalfSplit;
  Path path = Path::kAuto;
};

// Rows of positions [first, first + rows), first and rows multiples of the block; rows behind the
// text are never read. Keys [n, G, rows, K] are turned to their place inside their block and never
// again; a block read at another place is read with a query turned the other way,
// (R_{p - base} q) . (R_o k). Values [n, G, rows, V]. Contiguous rows are gathered without a copy.
struct Stored {
  at::Tensor k, v;
  std::int64_t first = 0;
};

// k [n, T, G, K] of positions from `start` on, as Stored holds it.
at::Tensor turned_in_block(const at::Tensor& k_nTGK, std::int64_t start, const Reader& reader);

// x [n, T, G, D] as rows of Stored, zeros behind up to a whole block.
at::Tensor stored_rows(const at::Tensor& x_nTGD, std::int64_t block);

struct Read {
  at::Tensor out;       // [n, T, H, V]
  at::Tensor selected;  // int64 [n, T, H, top_k], -1 where there are fewer; where asked for
};
// q [n, T, H, K], not turned, of the positions from `start` on; stored rows reach to the last of
// them and back to the oldest block that is read. Differentiable in q and in the rows; which blocks
// are picked is a constant.
Read read_blocks(const at::Tensor& q_nTHK, const Stored& stored, std::int64_t start,
                 const Reader& reader, bool want_selected);

// The picked blocks, rising, of scores [.., count]: the `picks` largest in multiples of the grid,
// the later of two equals.
at::Tensor picked_blocks(const at::Tensor& scores, std::int64_t picks);

}  // namespace everlong::landmark
