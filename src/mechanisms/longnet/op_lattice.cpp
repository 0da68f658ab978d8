#include "mechanisms/longnet/op_lattice.h"

#include <ATen/ATen.h>

namespace everlong::longnet {
namespace {

at::Tensor strided(const at::Tensor& x, const Piece& piece, std::int64_t token, std::int64_t rows,
                   std::int64_t group) {
  const std::int64_t token_stride = x.stride(1), head = x.stride(2) * group;
  const std::int64_t start = x.storage_offset() + token * token_stride + piece.heads.first * head;
  return x.as_strided({x.size(0), piece.heads.count, piece.run.segments, rows, group, x.size(3)},
                      {x.stride(0), piece.heads.step * head, piece.segment * token_stride,
                       piece.ratio * token_stride, x.stride(2), x.stride(3)},
                      start);
}

// Past rows in front of those of the call, [M, S, D].
at::Tensor packed_keys(const Piece& piece, const at::Tensor& x, const std::vector<at::Tensor>& past,
                       at::ScalarType dtype) {
  const std::int64_t D = x.size(3);
  const at::Tensor fresh = piece.keys(x);
  const std::int64_t matrices = fresh.size(0) * fresh.size(1) * fresh.size(2);
  if (piece.run.past == 0) return fresh.reshape({matrices, piece.run.keys, D}).to(dtype);
  return at::cat({piece.past(past[piece.pattern]), fresh.squeeze(2)}, 2)
      .reshape({matrices, piece.run.all_keys(), D})
      .to(dtype);
}

}  // namespace

at::Tensor Piece::queries(const at::Tensor& x) const {
  return strided(x, *this, run.key_token + (run.keys - run.queries) * ratio, run.queries, group);
}
at::Tensor Piece::keys(const at::Tensor& x) const {
  return strided(x, *this, run.key_token, run.keys, 1).squeeze(4);
}
at::Tensor Piece::past(const at::Tensor& x) const {
  const std::int64_t end = heads.first + heads.step * (heads.count - 1) + 1;
  return x.slice(1, heads.first, end, heads.step).narrow(2, 0, run.past);
}

std::vector<Piece> make_pieces(const Geometry& geometry, std::int64_t heads, std::int64_t kv_heads,
                               std::int64_t position, std::int64_t tokens) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < geometry.patterns.size(); ++i) {
    const auto [w, r] = geometry.patterns[i];
    for (const HeadClass& c : head_classes(geometry.offset_rule, kv_heads, r))
      for (const LatticeRun& run : make_runs(geometry, i, c.offset, position, tokens))
        pieces.push_back({i, w, r, heads / kv_heads, c, run});
  }
  return pieces;
}

at::Tensor packed_rows(const Piece& piece, const at::Tensor& x) {
  const at::Tensor rows = piece.queries(x);
  return rows.reshape(
      {rows.size(0) * rows.size(1) * rows.size(2), rows.size(3) * rows.size(4), rows.size(5)});
}

Panel make_panel(const Piece& piece, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const Past& past, const Geometry& geometry, double scale) {
  const at::ScalarType operand = operand_of(q);
  Panel panel;
  panel.q_MRK = packed_rows(piece, q).to(operand);
  panel.k_MSK = packed_keys(piece, k, past.k, operand);
  panel.v_MSV = packed_keys(piece, v, past.v, operand);
  panel.group = piece.group;
  panel.ratio = piece.ratio;
  panel.phantom = piece.run.phantom;
  panel.causal = geometry.causal;
  panel.scale = scale;
  return panel;
}

}  // namespace everlong::longnet
