// The gradients of one key head of one row of the batch, for any sections (the softmax block) and
// for short ones (fused).
#pragma once
#include "mechanisms/landmark/kernel_cpu_sections.h"

namespace everlong::landmark {

// most_sections: of any row of the batch. Scratch is taken from the arena.
std::int64_t plain_backward_bytes(const Plan& plan, std::int64_t most_sections);
void plain_backward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
                    std::int64_t most_sections, Arena& arena);
std::int64_t fused_backward_bytes(const Plan& plan, std::int64_t most_sections);
void fused_backward(const Plan& plan, const KernelGrads& grads, std::int64_t b, std::int64_t head,
                    std::int64_t most_sections, Arena& arena);

}  // namespace everlong::landmark
