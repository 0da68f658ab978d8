// Between kernel_cpu.cpp, which plans, and kernel_cpu_simd.cpp, which computes.
#pragma once
#include "mechanisms/megalodon/kernel.h"

namespace everlong::megalodon::cpu {

inline constexpr std::int64_t kTile = 64;   // tokens that stay in the first cache, forward
inline constexpr std::int64_t kLanes = 16;  // rows of scratch are padded to this many floats
inline constexpr std::int64_t kPlanes = 5;  // q (re, im), a, c (re, im)
inline constexpr std::int64_t kBlock = 64;  // channels of a block, where groups allow

// Channels [channel, channel + width), norm groups [group, group + groups) of group_width each.
struct Block {
  std::int64_t channel = 0, width = 0, padded = 0;
  std::int64_t group = 0, groups = 0, group_width = 0;
};
Block block_of(const NormEmaCall& call, std::int64_t index);
std::int64_t blocks(const NormEmaCall& call);

// Floats of scratch, a multiple of kLanes.
std::int64_t forward_scratch(const NormEmaCall& call);
std::int64_t backward_scratch(const NormEmaCall& call);

void forward_block(const NormEmaCall& call, const NormEmaResult& result, const Block& block,
                   float* scratch);
void backward_block(const NormEmaCall& call, const NormEmaGrads& grads, const Block& block,
                    float* scratch);

}  // namespace everlong::megalodon::cpu
