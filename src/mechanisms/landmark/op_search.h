// Picking blocks on the CPU at SIMD speed: no score is stored.
#pragma once
#include "mechanisms/landmark/params.h"

namespace at {
class Tensor;
}

namespace everlong::landmark {

// The picks of every token and head, rising: int64 [n, m, t, H, picks]. Group j of m has the frame
// of `first_local + j`; all have as many picks P. q_nmStHK: its t tokens by slot, S = P + 1, as
// blocks see them that are scored there. keys_nGcK: one key a block, from the oldest of group 0 to
// the youngest of the last. Equal scores as in BestBlocks, in multiples of kScoreGrid32.
at::Tensor search_blocks(const at::Tensor& q_nmStHK, const at::Tensor& keys_nGcK,
                         const Retrieval& retrieval, std::int64_t first_local, double scale);

}  // namespace everlong::landmark
