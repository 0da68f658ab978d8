// What softmax attention carries: the keys and values of the past, keys already rotated to their
// absolute positions.
#pragma once
#include "layers/row_cache.h"
#include "mechanisms/softmax/op.h"

namespace everlong::softmax {

struct CacheShape {
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
  std::int64_t window = 0;  // 0: everything is kept
};

// With a window of W, rows leave W at a time (W - 1 are seen).
class KvState final : public RowCache {
 public:
  KvState(std::int64_t sequences, const CacheShape& shape, const at::TensorOptions& options);

  // Takes the new tokens' q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] (keys rotated) behind the
  // past of their sequences, moves the positions on and returns the attention [B, T, H, V]. Each
  // sequence reads its own rows only.
  at::Tensor attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                    const Sequences& sequences, const Options& options);

 private:
  std::unique_ptr<RowCache> fresh(std::int64_t sequences) const override;
  // The first row of a part that any of its new tokens sees.
  std::int64_t seen_from(const StatePart& part) const;

  CacheShape shape_;
};

}  // namespace everlong::softmax
