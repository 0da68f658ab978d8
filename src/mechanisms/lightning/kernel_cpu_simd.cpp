// Compiled once for every instruction set (Highway); run_sweep and run_step choose among them.
#include <cmath>
#include <cstring>
#include <utility>

#include "mechanisms/lightning/kernel_cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/lightning/kernel_cpu_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "mechanisms/lightning/kernel_cpu_pack-inl.h"
#include "mechanisms/lightning/kernel_cpu_step-inl.h"
#include "mechanisms/lightning/kernel_cpu_sweep-inl.h"
#include "mechanisms/lightning/kernel_cpu_tiles-inl.h"

#if HWY_ONCE
namespace everlong::lightning::cpu {

HWY_EXPORT(sweep_any_type);
HWY_EXPORT(step_any_type);

void run_sweep(std::span<const Sweep> heads, float* scratch) {
  HWY_DYNAMIC_DISPATCH(sweep_any_type)(heads, scratch);
}
void run_step(const Step& step) { HWY_DYNAMIC_DISPATCH(step_any_type)(step); }

}  // namespace everlong::lightning::cpu
#endif
