// How the composite form is cut into blocks of scores, and how a block is made.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>
#include <vector>

namespace everlong::softmax {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Legend of the folded tensors: M = B G matrices; a row is (token, head of the group), T R rows.
struct Plan {
  std::int64_t matrices = 0, tokens = 0, group = 1, keys = 0, window = 0;
  double scale = 1;
  // Dtypes of the products' operands, and of their results and the softmax.
  at::ScalarType operand = at::kFloat, wide = at::kFloat;
  // A block of scores: tokens, keys, and matrices it spans.
  std::int64_t rows = 0, columns = 0, together = 1;

  std::int64_t first_row_key(std::int64_t t) const { return keys - tokens + t; }
};

// For q [M, T R, K] and k [M, S, K].
Plan make_plan(const at::Tensor& q_MRK, const at::Tensor& k_MSK, std::int64_t group,
               std::int64_t window, double scale);

// Some tokens of some matrices, and the keys that any of them sees.
struct Block {
  std::int64_t matrix, matrices, token, tokens, key_begin, key_end;
};

std::vector<Block> make_blocks(const Plan& plan);

// The part of a tensor that a block works on: of [M, T R, D] its rows, of [M, S, D] `count` keys
// from `begin` on. Views.
at::Tensor rows_of(const at::Tensor& x_MRD, const Block& block, const Plan& plan);
at::Tensor keys_of(const at::Tensor& x_MSD, const Block& block, std::int64_t begin,
                   std::int64_t count);

// a b, with wide results of low-precision operands.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const Plan& plan);

// Makes blocks of scores. Holds the scratch of the whole walk: a result is valid until the next.
class Scores {
 public:
  // The plan must outlive it; `options` are those of q.
  Scores(const Plan& plan, const at::TensorOptions& options);

  // a [m, rows, D] times b [m, columns, D] transposed.
  at::Tensor product(const at::Tensor& a, const at::Tensor& b);

  // Scaled scores of a block's rows and the keys [begin, begin + k.size(1)); what a row does not
  // see is -inf.
  at::Tensor make(const Block& block, const at::Tensor& q, const at::Tensor& k, std::int64_t begin);

 private:
  void hide(const at::Tensor& scores, const Block& block, const at::Tensor& mask, std::int64_t band,
            std::int64_t begin);

  const Plan& plan_;
  at::Tensor scratch_, future_, forgotten_;
};

}  // namespace everlong::softmax
