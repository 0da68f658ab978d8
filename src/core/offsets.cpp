#include "core/offsets.h"

namespace everlong {

Status check_offsets(std::span<const std::int64_t> offsets, std::int64_t batch,
                     std::int64_t tokens) {
  if (offsets.empty()) return {};
  if (batch != 1)
    return invalid_argument("cu_seqlens is given with batch ", batch,
                            "; packed sequences lie on one line: reshape to [1, B*T, H, D]");
  if (offsets.size() < 2)
    return invalid_argument(
        "cu_seqlens has 1 entry; N sequences need N+1 offsets, from 0 to the number of tokens");
  if (offsets.front() != 0)
    return invalid_argument("cu_seqlens[0] = ", offsets.front(),
                            "; the first sequence must start at 0");
  for (std::size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] < offsets[i - 1])
      return invalid_argument("cu_seqlens[", i, "] = ", offsets[i], " is below cu_seqlens[", i - 1,
                              "] = ", offsets[i - 1], "; offsets must not decrease");
  if (offsets.back() != tokens)
    return invalid_argument("cu_seqlens ends at ", offsets.back(), " but there are ", tokens,
                            " tokens; the last offset must be the number of tokens");
  return {};
}

}  // namespace everlong
