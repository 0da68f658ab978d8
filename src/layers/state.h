// What a layer carries from token to token: typed per room, seen here by everyone else.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/status.h"
#include "ops/operator.h"

namespace everlong {

// The state of one layer for N independent sequences, each at a position of its own. Owned by
// sessions and training loops, never by layers. Not thread safe; distinct states are independent.
class State {
 public:
  explicit State(std::int64_t sequences) : positions_(static_cast<std::size_t>(sequences), 0) {}
  virtual ~State() = default;

  std::int64_t sequences() const { return static_cast<std::int64_t>(positions_.size()); }
  // Tokens fed so far, per sequence: the absolute position of the next token.
  const std::vector<std::int64_t>& positions() const { return positions_; }
  std::vector<std::int64_t>& positions() { return positions_; }

  // Everything that is carried except the positions, by name; dimension 0 is the sequence. Handles,
  // not copies.
  virtual TensorMap tensors() const = 0;
  // Takes tensors of the same names, dtypes and (but for dimensions that grow with the position)
  // shapes in place of its own. Refuses, and changes nothing, when they do not fit. Keeps autograd
  // history.
  virtual Status restore(const TensorMap& tensors) = 0;
  // A new state made of the named sequences, deep-copied (differentiably, under grad mode); -1 is a
  // fresh sequence. Serves clone, fork, reset, reordering and change of batch alike.
  virtual std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const = 0;
  // Most bytes this state may hold when every sequence has seen at most `tokens` tokens. A room of
  // bounded state answers the same for all large `tokens`.
  virtual std::int64_t bytes_bound(std::int64_t tokens) const = 0;

  std::unique_ptr<State> clone() const;
  // Of the tensors' storages (views into larger buffers count the buffer); a room that holds more
  // than it carries answers for itself.
  virtual std::int64_t bytes() const;

 protected:
  // positions() for select(): the position of each named sequence, 0 for -1.
  std::vector<std::int64_t> selected_positions(std::span<const std::int64_t> sequences) const;

 private:
  std::vector<std::int64_t> positions_;
};

// select() for a tensor [N, ...] whose fresh value is zero.
at::Tensor select_sequences(const at::Tensor& tensor, std::span<const std::int64_t> sequences);

}  // namespace everlong
