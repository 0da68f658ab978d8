// cu_seqlens: where the sequences of a packed line begin and end.
#pragma once
#include <cstdint>
#include <span>

#include "core/status.h"

namespace everlong {

// Sequence n owns tokens [offsets[n], offsets[n + 1]). Refuses offsets of a batch other than 1, and
// those that do not start at 0, fall, or do not end at `tokens`. No offsets at all (rows of one
// length) are legal, and so are empty sequences.
Status check_offsets(std::span<const std::int64_t> offsets, std::int64_t batch,
                     std::int64_t tokens);

}  // namespace everlong
