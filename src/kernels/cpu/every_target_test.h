// Kernels that choose their instructions at run time, tested on all of them.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>

#include <hwy/highway.h>

namespace everlong::cpu {

// Every SIMD target that this machine has and the build holds, one after the other.
template <class Body>
void on_every_target(const Body& body) {
  int count = 0;
  for (std::int64_t bit = 1; bit > 0 && bit <= HWY_SCALAR; bit <<= 1) {
    if ((hwy::SupportedTargets() & HWY_TARGETS & bit) == 0) continue;
    hwy::SetSupportedTargetsForTest(bit);
    hwy::GetChosenTarget().Update(bit);
    {
      SCOPED_TRACE(hwy::TargetName(bit));
      body();
    }
    hwy::SetSupportedTargetsForTest(0);
    ++count;
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  EXPECT_GE(count, 2);
}

}  // namespace everlong::cpu
