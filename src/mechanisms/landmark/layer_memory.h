// What Landmark Attention carries: the blocks of the past, keys turned to their place inside their
// block, landmarks among them.
#pragma once
#include "layers/mixer.h"
#include "layers/state.h"
#include "mechanisms/landmark/op_blocks.h"

namespace everlong::landmark {

struct MemoryShape {
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
  Retrieval retrieval;  // block, window and max_blocks decide what is kept
};

// Rows that a sequence holds after `position` tokens, and the position of the first. Both depend on
// the position alone, so every way of cutting a text leaves the same state. Without max_blocks
// everything is kept. With it, blocks leave R = max_blocks + window + 1 at a time: R to 2R are held
// once 2R have passed, and moving them costs one row's copy a token.
std::int64_t first_row(std::int64_t position, const Retrieval& retrieval);
std::int64_t held_rows(std::int64_t position, const Retrieval& retrieval);
// Rows allocated to hold `rows`: steps of an eighth, in whole blocks.
std::int64_t capacity_for(std::int64_t rows, const Retrieval& retrieval);

// tensors(): "k" [N, G, C, K] and "v" [N, G, C, V]; row r of sequence n is position first_row + r,
// rows behind held_rows are never read (zeros), C = capacity_for the longest sequence. Under grad
// mode new tensors are made (exact gradients through what is carried); without it new rows are
// written in place, never over rows that are held, so handles from tensors() stay true for the
// positions they were taken at.
class BlockMemory final : public State {
 public:
  BlockMemory(std::int64_t sequences, const MemoryShape& shape, const at::TensorOptions& options);

  TensorMap tensors() const override { return {{"k", k_}, {"v", v_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

  // Takes the new tokens' q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] (not turned) behind the
  // past of their sequences, moves the positions on and returns what read_blocks returns. Each
  // sequence reads its own rows only.
  Read attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
              const Sequences& sequences, const Reader& reader, bool want_picks);

 private:
  // Neighbouring sequences at one position with as many new tokens each, handled together.
  struct Part {
    std::int64_t first = 0, count = 0;  // sequences
    // Where their tokens lie: rows [row, row + count) of the batch from `token` on.
    std::int64_t row = 0, token = 0, tokens = 0, position = 0;
  };
  std::vector<Part> parts(std::int64_t tokens, const Sequences& sequences) const;
  void check_rows() const;
  at::Tensor grown(const at::Tensor& buffer, std::int64_t rows) const;

  MemoryShape shape_;
  at::Tensor k_, v_;
  bool shared_ = false;  // someone else may hold these tensors: copy before writing
};

}  // namespace everlong::landmark
