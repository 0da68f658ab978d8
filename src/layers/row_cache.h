// Keys and values of the past, a row a token: what the attention rooms with a cache carry.
#pragma once
#include <string_view>

#include "layers/mixer.h"
#include "layers/state_parts.h"

namespace everlong {

// What is kept. Rows held depend on the position alone, so every way of cutting a text leaves the
// same state. Without a ring everything is kept. With one of R tokens, rows leave R at a time: R to
// 2R - 1 are held once 2R tokens have passed, and moving them costs one row's copy a token.
struct RowPolicy {
  std::string_view room;  // begins every message
  std::int64_t kv_heads = 1, key_dim = 1, value_dim = 1;
  std::int64_t ring = 0;  // tokens; 0: nothing ever leaves
  std::int64_t step = 1;  // allocated rows are a multiple of it

  // Position of the first row that is held after `position` tokens, and how many are.
  std::int64_t first_row(std::int64_t position) const;
  std::int64_t held_rows(std::int64_t position) const { return position - first_row(position); }
  // Rows allocated to hold `rows`: steps of an eighth, in multiples of 256, at most 2 ring. Growth
  // copies each row about nine times over the whole life of a cache.
  std::int64_t capacity_for(std::int64_t rows) const;
};

// tensors(): "k" [N, G, C, K] and "v" [N, G, C, V]; row r of sequence n is position first_row + r,
// rows behind held_rows are never read (zeros), C = capacity_for the longest sequence. Under grad
// mode rooms make new tensors (exact gradients through what is carried); without it new rows are
// written in place, never over rows that are held, so handles from tensors() stay true for the
// positions they were taken at.
class RowCache : public State {
 public:
  RowCache(std::int64_t sequences, const RowPolicy& policy, const at::TensorOptions& options);

  TensorMap tensors() const override { return {{"k", k_}, {"v", v_}}; }
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  std::int64_t bytes_bound(std::int64_t tokens) const override;

 protected:
  // A fresh state of the same class and shape.
  virtual std::unique_ptr<RowCache> fresh(std::int64_t sequences) const = 0;

  // Throws where the tensors have fewer rows than a position needs.
  void check_rows() const;
  // Rows that the longest sequence holds after its part's tokens; whether one drops rows then.
  std::int64_t longest_after(const std::vector<StatePart>& parts) const;
  bool any_leaves(const std::vector<StatePart>& parts) const;
  // Makes both buffers writable by this state alone, with room for `capacity` rows.
  void own_buffers(std::int64_t capacity);
  // Takes new buffers in pieces of [count, G, rows, D], each filled up with zeros to `capacity`.
  void take_buffers(const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
                    std::int64_t capacity);

  const RowPolicy& policy() const { return policy_; }
  const at::Tensor& keys() const { return k_; }
  const at::Tensor& values() const { return v_; }

 private:
  RowPolicy policy_;
  at::Tensor k_, v_;
  bool shared_ = false;  // someone else may hold these tensors: copy before writing
};

// [n, G, rows, D] with zeros behind, up to `capacity` rows.
at::Tensor padded_rows(const at::Tensor& rows, std::int64_t capacity);

}  // namespace everlong
