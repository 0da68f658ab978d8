// The block of softmax attention that several rooms share: a tile of queries against a run of keys,
// forward and backward, on the CPU.
//
//   s_rj = scale q_r . k_j + bias_j      p_rj = exp(s_rj - lse_r)      o_r = sum_j p_rj v_j
//
// over the keys j in [begin_r, end_r) of the run: what a row sees is one interval of keys, each row
// its own. How the masks of the rooms map to it, for a row at key position i of its sequence and a
// run that starts at position a (intervals are cut to the run, so they may point outside):
//   causal triangle      begin 0, end i + 1 - a
//   sliding window W     begin i - W + 1 - a, end i + 1 - a
//   documents            begin at the row's document, end i + 1 - a: documents are intervals
//   local chunks         (Megalodon, Infini) begin at the row's chunk; value_dim may differ from
//                        key_dim
//   log multiplicity     (LongNet) bias = log c of a key, -inf hides it; a constant for a block of
//                        keys, or one call of absorb a block. Patterns with lse of their own: merge
//   landmark gate        (Landmark, section 2) own section: absorb, causal. A past block b:
//   restart,
//                        absorb its ordinary keys, finish into (o_b, lambda_b), then softmax_merge
//                        with the gate's score z_b in the place of lambda_b. Backward: the block's
//                        keys with lse_r = L_r - z_rb + lambda_rb and delta_r = D_rb
// Several runs (a cache, then new keys) are several calls of absorb; partial results made apart
// merge exactly through (o, lse).
//
// A row that sees no key has o = 0, lse = -inf and zero gradients. A NaN or infinity in a key or
// value stays in the rows that see it, and one in a query stays in the keys that it sees.
//
// fp32 inside, whatever the dtype of the arrays (fp32 or bf16). Nothing is allocated; one object
// works on one thread. Online softmax: 2205.14135 (algorithm 1); backward: the same, appendix B.
#pragma once
#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace everlong::cpu {

inline constexpr int kTileRows = 96;  // most queries of a tile
inline constexpr int kTileKeys = 96;  // most keys that SoftmaxBackward holds
inline constexpr int kMostDim = 256;  // of keys and of values, each at least 1

// Vectors with free strides (elements): row r lies at (r / group) * outer + (r % group) * inner;
// its entries are contiguous. group > 1: the query heads of one key head as rows of one tile.
template <class Void>
struct BasicRows {
  Void* data = nullptr;
  DType dtype = DType::kFloat32;  // or kBFloat16; numbers a row (lse, delta) are fp32
  std::int64_t outer = 0, inner = 0, group = 1;

  operator BasicRows<const void>() const { return {data, dtype, outer, inner, group}; }
  std::int64_t at(std::int64_t row) const { return row / group * outer + row % group * inner; }
};
using Rows = BasicRows<const void>;
using MutableRows = BasicRows<void>;

struct SoftmaxShape {
  int key_dim = 0, value_dim = 0;
  float scale = 1;
};

struct KeyRun {
  Rows k, v;  // one dtype
  std::int64_t count = 0;
  const float* bias = nullptr;  // [count], added to the scaled scores; null: none
};

// Row r sees the keys [begin[r], end[r]) of the run; an empty or reversed interval sees none.
struct Sight {
  const std::int64_t* begin = nullptr;
  const std::int64_t* end = nullptr;
};

// Forward of one tile: begin, absorb any number of runs, finish.
class SoftmaxForward {
 public:
  // 64-byte aligned, contents free. Independent of the number of keys.
  static std::int64_t scratch_bytes(int key_dim, int value_dim);
  SoftmaxForward(const SoftmaxShape& shape, void* scratch);

  void begin(const Rows& q, int rows);
  void restart();  // the same queries, nothing seen yet
  // Goes on from a finished result of the same queries (after begin or restart).
  void resume(const Rows& o, const Rows& lse);
  void absorb(const KeyRun& keys, const Sight& sight);
  // The same for up to kMostTogether tiles of one shape: keys are fetched once for all of them.
  static constexpr int kMostTogether = 4;
  static void absorb_together(std::span<SoftmaxForward> tiles, const KeyRun& keys,
                              std::span<const Sight> sights);
  // o of dtype fp32 or bf16; lse (natural logarithm) may be absent.
  void finish(const MutableRows& o, const MutableRows& lse) const;

 private:
  SoftmaxShape shape_;
  void* scratch_;
  int rows_ = 0;
};

// The softmax over both sets of keys, from the softmax over each: o_a and lse_a become the union.
// Weights are exp(lse); a part with lse = -inf is not read. fp32.
void softmax_merge(const MutableRows& o_a, const MutableRows& lse_a, const Rows& o_b,
                   const Rows& lse_b, int rows, int value_dim);

struct QueryRows {
  Rows q, grad_o;
  Rows lse, delta;  // of the whole softmax; delta_r = o_r . grad_o_r
  int count = 0;    // at most kTileRows
};

// delta of some rows.
void softmax_delta(const Rows& o, const Rows& grad_o, int rows, int value_dim,
                   const MutableRows& delta);

// What SoftmaxBackward::absorb summed for a tile, times scale, into its gradient.
void softmax_write_grad_q(const float* grad_q, const SoftmaxShape& shape, int rows,
                          const MutableRows& to);

// Backward of up to kTileKeys keys: begin, absorb every tile of queries that sees them, finish.
class SoftmaxBackward {
 public:
  static std::int64_t scratch_bytes(int key_dim, int value_dim);
  SoftmaxBackward(const SoftmaxShape& shape, void* scratch);

  void begin(const KeyRun& keys);
  // Adds dq / scale of these queries to grad_q [kTileRows, grad_q_stride()], fp32 and 64-byte
  // aligned; columns behind key_dim are scratch.
  void absorb(const QueryRows& queries, const Sight& sight, float* grad_q);
  std::int64_t grad_q_stride() const { return (shape_.key_dim + 31) / 32 * 32; }
  void finish(const MutableRows& grad_k, const MutableRows& grad_v) const;

 private:
  SoftmaxShape shape_;
  void* scratch_;
  int keys_ = 0;
};

}  // namespace everlong::cpu
