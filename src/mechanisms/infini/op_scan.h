// The scan over segments, differentiable, with gradients cut where asked.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace everlong::infini {

// x_0 = start; x_{s+1} = x_s + add_s, or with `take` [B, S, G, K, K] x_{s+1} = x_s - take_s x_s +
// add_s. start [B, G, ..], add [B, S, G, ..] -> all of them, [B, S + 1, G, ..]. Summed from the
// first to the last, so every cut of a text gives the same bits. Gradients of x_s stop there where
// cut[s] is not 0 (S + 1 flags).
at::Tensor scan_segments(const at::Tensor& start, const at::Tensor& add, const at::Tensor& take,
                         const std::vector<std::int64_t>& cut);

}  // namespace everlong::infini
