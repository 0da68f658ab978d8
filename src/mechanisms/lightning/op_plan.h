// How the tokens of a call are cut into blocks of chunks: arithmetic on lengths, no values.
//
// The first chunk of a sequence takes the remainder (1 to n tokens), every other chunk is full. So
// a decay over a chunk is always over its true length, and a state is never carried across padding.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "mechanisms/lightning/params.h"

namespace everlong::lightning {

// Chunks that are computed together: `ranks` consecutive chunks of each of `rows` sequences.
struct Block {
  std::int64_t row = 0, rows = 0;  // sequences, in the plan's order
  std::int64_t ranks = 0;          // chunks of each of them; 1 when the chunk is not a full one
  std::int64_t chunk = 0;          // tokens of a chunk, padding included
  std::int64_t first = 0;          // the first token of each row; packed: the first slot
  std::vector<std::int64_t> length =
      {};  // packed first chunks: true tokens of each row, at the end of its chunk
};

struct PlanLimits {
  std::int64_t chunk = 64;    // tokens of a full chunk
  std::int64_t group = 8;     // most chunks of one sequence in a block
  std::int64_t tokens = 512;  // wanted tokens of a block
};

struct Plan {
  std::vector<Block> blocks;  // a sequence's blocks in the order of time
  // Blocks [batches[i], batches[i+1]) work on rows of their own: batches may run at the same time.
  std::vector<std::int64_t> batches = {0};
  std::int64_t rows = 0;  // sequences that have tokens
  // Packed lines only. A block's slots are [rows, ranks, chunk], row by row; a padding slot's token
  // is T.
  std::vector<std::int64_t> order;  // sequence of each row
  std::vector<std::int64_t> slot_token;

  bool packed() const { return !order.empty(); }
};

// Tokens of equal-length sequences are addressed by (row, token), others by slots. Total work and
// padding are O(T + N n), however uneven the lengths.
Plan plan_rows(std::int64_t rows, std::int64_t tokens, const PlanLimits& limits);
Plan plan_packed(std::span<const std::int64_t> cu_seqlens, const PlanLimits& limits);

}  // namespace everlong::lightning
