// What Landmark Attention carries: the blocks of the past, keys turned to their place inside their
// block, landmarks among them.
#pragma once
#include "layers/row_cache.h"
#include "mechanisms/landmark/op_blocks.h"

namespace everlong::landmark {

struct MemoryShape {
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
  Retrieval retrieval;  // block, window and max_blocks decide what is kept
};

// Whole blocks are allocated. With max_blocks, max_blocks + window + 1 blocks leave at a time.
RowPolicy row_policy(const MemoryShape& shape);

class BlockMemory final : public RowCache {
 public:
  BlockMemory(std::int64_t sequences, const MemoryShape& shape, const at::TensorOptions& options);

  // Takes the new tokens' q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] (not turned) behind the
  // past of their sequences, moves the positions on and returns what read_blocks returns. Each
  // sequence reads its own rows only.
  Read attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
              const Sequences& sequences, const Reader& reader, bool want_picks);

 private:
  std::unique_ptr<RowCache> fresh(std::int64_t sequences) const override;

  MemoryShape shape_;
};

}  // namespace everlong::landmark
