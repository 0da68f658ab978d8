// Work of unequal size over threads, and the workspace it runs in.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <span>
#include <string_view>

#include "core/parallel.h"
#include "core/status.h"

namespace everlong::cpu {

inline constexpr std::int64_t kWorkspaceAlign = 64;

inline std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kWorkspaceAlign - 1) / kWorkspaceAlign * kWorkspaceAlign;
}

// Calls work(unit, thread) once for each unit; every thread takes the next one when it is free, so
// large units belong first.
template <class Work>
void spread(const Executor& executor, std::int64_t units, const Work& work) {
  std::atomic<std::int64_t> next = 0;
  executor.run(std::min<std::int64_t>(executor.threads(), units), [&](std::int64_t, int thread) {
    for (;;) {
      const std::int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units) return;
      work(unit, thread);
    }
  });
}

inline Status check_workspace(std::span<const std::byte> workspace, std::int64_t needed,
                              std::string_view room) {
  if (static_cast<std::int64_t>(workspace.size()) < needed ||
      reinterpret_cast<std::uintptr_t>(workspace.data()) % kWorkspaceAlign != 0)
    return invalid_argument(room, ": a workspace of ", workspace.size(), " bytes; ", needed,
                            " are needed, aligned to ", kWorkspaceAlign);
  return {};
}

}  // namespace everlong::cpu
