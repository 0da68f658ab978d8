// Compiled once for every instruction set (Highway); forward_block and backward_block choose.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "mechanisms/megalodon/kernel_cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/megalodon/kernel_cpu_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "mechanisms/megalodon/kernel_cpu_backward-inl.h"
#include "mechanisms/megalodon/kernel_cpu_forward-inl.h"
#include "mechanisms/megalodon/kernel_cpu_rows-inl.h"

#if HWY_ONCE
namespace everlong::megalodon::cpu {

HWY_EXPORT(forward_any);
HWY_EXPORT(backward_any);

void forward_block(const NormEmaCall& call, const NormEmaResult& result, const Block& block,
                   float* scratch) {
  HWY_DYNAMIC_DISPATCH(forward_any)(call, result, block, scratch);
}
void backward_block(const NormEmaCall& call, const NormEmaGrads& grads, const Block& block,
                    float* scratch) {
  HWY_DYNAMIC_DISPATCH(backward_any)(call, grads, block, scratch);
}

}  // namespace everlong::megalodon::cpu
#endif
