// What attention over some blocks can be wrong by, compared with all of them: a number that comes
// with every answer, because a landmark's score is its block's whole weight.
//
// A query reads local tokens and the blocks S, and leaves the blocks U unread; all gate scores z
// are known. With L = log(exp(lse of local and S) + sum_U exp(z_b)) the gates are g_b = exp(z_b -
// L), and what a block adds is g_b times a weighted mean of its values, whose norm is at most the
// largest |v| of the block. So, in the 2-norm (README.md, section 3; spec: 2305.16300 has no such
// bound, it follows from equation 5 there):
//
//   out of S alone, as it is:      |o - o_S|             <= sum_U g_b (max|v|_b + |o_S|)
//   out of S times (1 - sum_U g):  |o - (1 - G_U) o_S|   <= sum_U g_b max|v|_b
//
// The second is kWithTrueSum: the unread blocks keep their share of the softmax's sum and add
// nothing. Both hold for whatever the unread values and inner weights are, hence wherever the
// blocks are placed. The gates of U are those of the scores given; numbers are fp64, and the bound
// says nothing of the rounding of o_S itself.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace everlong::landmark {

enum class Unread { kLeftOut, kWithTrueSum };

struct Certificate {
  double bound = 0;         // on the 2-norm of the error; NaN scores or norms give infinity
  double unread_share = 0;  // G_U: the softmax weight that was not read; scale o_S by 1 - it
  double lse = 0;           // L, over everything
};

// Sums up what is not read, in one pass and constant memory. Scores of -inf add nothing.
class UnreadBlocks {
 public:
  void add(double score, double value_norm);
  // read_lse: log-sum-exp of the local scores and the gates of S, -inf when nothing was read;
  // out_norm: |o_S|, not used by kWithTrueSum.
  Certificate certify(double read_lse, double out_norm, Unread unread) const;

 private:
  double top_, sum_ = 0, weighed_ = 0;  // of exp(score - top_), and of that times the norm

 public:
  UnreadBlocks();
};

struct BlockChoice {
  std::vector<std::int64_t> blocks;  // rising indices into scores
  // What certify will say at most once these are read where they were scored.
  double bound = 0;
  bool certified = false;  // bound <= epsilon
};

struct ChoiceLimits {
  double epsilon = 1e-3;
  std::int64_t at_least = 1;  // the best of these by score are read whatever the bound: top_k
  std::int64_t at_most = std::numeric_limits<std::int64_t>::max();
};

// The best at_least blocks by score (the younger of equals), then as few more as bring the bound
// below epsilon: largest share of the bound first. local_lse: of the local scores, -inf for none;
// local_norm: largest |v| among local tokens (only for kLeftOut, whose |o_S| it bounds before
// anything is read). scores and value_norms: one a block, old to young. A NaN certifies nothing.
BlockChoice choose_blocks(std::span<const float> scores, std::span<const float> value_norms,
                          double local_lse, double local_norm, const ChoiceLimits& limits,
                          Unread unread);

}  // namespace everlong::landmark
