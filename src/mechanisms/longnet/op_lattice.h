// Lattice rows of tensors: strided views, and the panels packed from them.
#pragma once
#include "mechanisms/longnet/op.h"
#include "mechanisms/longnet/op_panel.h"
#include "mechanisms/longnet/params_lattice.h"

namespace everlong::longnet {

// One run of one pattern and head class of a call.
struct Piece {
  std::size_t pattern;
  std::int64_t segment, ratio, group;  // group: query heads a key/value head
  HeadClass heads;
  LatticeRun run;

  // Views of x [B, T, H or G, D]: [B, heads, segments, rows, (group,) D].
  at::Tensor queries(const at::Tensor& x_BTHD) const;
  at::Tensor keys(const at::Tensor& x_BTGD) const;
  // Of a buffer [B, G, C, D]: [B, heads, past rows, D].
  at::Tensor past(const at::Tensor& x_BGCD) const;
};

// Every piece of every pattern, in a fixed order.
std::vector<Piece> make_pieces(const Geometry& geometry, std::int64_t heads, std::int64_t kv_heads,
                               std::int64_t position, std::int64_t tokens);

// The lattice rows of a piece, copied.
Panel make_panel(const Piece& piece, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const Past& past, const Geometry& geometry, double scale);

// x [B, T, H, D] or [B, T, H, 1] at the rows of a piece, as rows of its panel [M, R, D]: a copy.
at::Tensor packed_rows(const Piece& piece, const at::Tensor& x_BTHD);

}  // namespace everlong::longnet
