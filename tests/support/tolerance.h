// The tolerance ledger: every bound that a test compares with, once, with its reason. Loosening one
// is its own commit.
#pragma once
#include "core/dtype.h"

namespace everlong::tolerance {

// Two float64 forms of one equation: rounding only. 1000 summed terms of size 1 lose about 1e-13; a
// decay that is off by one token, or a lost tail, shows at 1e-3 or more.
inline constexpr double kFormsFloat64 = 1e-12;

// Gradient against central differences, step 1e-4: truncation is about 1e-8 of the third
// derivative, cancellation 1e-16 / 1e-4.
inline constexpr double kFiniteDifference = 1e-6;

// Law 1 allows a form twice the error of the naive form in its own dtype plus this share of the
// largest value: naive may be exact by luck on a tiny case. A few ulps of the dtype.
constexpr double floor_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 4e-15;
    case DType::kFloat32:
      return 4e-6;  // 30 ulps: sums of 1000 terms in another order
    default:
      return 1.6e-2;  // bf16: 2 ulps of 2^-8, inputs and output rounded once each
  }
}

// A split against one pass, in one dtype: the same sums in another order.
constexpr double split_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-11;
    case DType::kFloat32:
      return 2e-5;
    default:
      return 2e-2;
  }
}

// Gradients of a whole layer through many pieces, float64: the same, through norms that divide by
// small numbers.
inline constexpr double kLayerGradientFloat64 = 1e-9;

}  // namespace everlong::tolerance
