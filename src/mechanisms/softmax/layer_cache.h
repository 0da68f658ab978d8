// What softmax attention carries: the keys and values of the past, keys already rotated to their
// absolute positions.
#pragma once
#include "layers/mixer.h"
#include "layers/state.h"
#include "mechanisms/softmax/op.h"

namespace everlong::softmax {

struct CacheShape {
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
  std::int64_t window = 0;  // 0: everything is kept
};

// Rows that a sequence holds after `position` tokens, and the position of the first. Both depend on
// the position alone, so every way of cutting a text leaves the same state. With a window of W,
// rows leave W at a time: W to 2W - 1 are held once 2W tokens have passed (W - 1 are seen), and
// moving them costs one row's copy a token.
std::int64_t first_row(std::int64_t position, std::int64_t window);
std::int64_t held_rows(std::int64_t position, std::int64_t window);
// Rows allocated to hold `rows`: steps of an eighth, in multiples of 256, at most 2W. Growth copies
// each row about nine times over the whole life of a cache.
std::int64_t capacity_for(std::int64_t rows, std::int64_t window);

// tensors(): "k" [N, G, C, K] and "v" [N, G, C, V]; row r of sequence n is position first_row + r,
// rows behind held_rows are never read (zeros), C = capacity_for the longest sequence. Under grad
// mode new tensors are made (exact gradients through what is carried); without it new rows are
// written in place, never over rows that are held, so handles from tensors() stay true for the
// positions they were taken at.
class KvState final : public State {
 public:
  KvState(std::int64_t sequences, const CacheShape& shape, const at::TensorOptions& options);

  TensorMap tensors() const override { return {{"k", k_}, {"v", v_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

  // Takes the new tokens' q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] (keys rotated) behind the
  // past of their sequences, moves the positions on and returns the attention [B, T, H, V]. Each
  // sequence reads its own rows only.
  at::Tensor attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
                    const Sequences& sequences, const Options& options);

 private:
  // Neighbouring sequences at one position with as many new tokens each, handled together.
  struct Group {
    std::int64_t first = 0, count = 0;  // sequences
    std::int64_t
        row = 0,
        token = 0;  // where their tokens lie: rows [row, row + count) of the batch from `token` on
    std::int64_t tokens = 0, position = 0;
  };
  std::vector<Group> groups(std::int64_t tokens, const Sequences& sequences) const;
  std::int64_t longest_after(const std::vector<Group>& groups) const;
  void check_rows() const;
  at::Tensor grown(const at::Tensor& buffer, std::int64_t rows) const;
  at::Tensor attend_in_place(const Group& group, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const Options& options);
  // As above; the group's new buffers [count, G, rows, D] are added to the lists.
  at::Tensor attend_anew(const Group& group, const at::Tensor& q, const at::Tensor& k,
                         const at::Tensor& v, const Options& options, std::vector<at::Tensor>& keys,
                         std::vector<at::Tensor>& values) const;

  CacheShape shape_;
  at::Tensor k_, v_;
  bool shared_ = false;  // someone else may hold these tensors: copy before writing
};

}  // namespace everlong::softmax
