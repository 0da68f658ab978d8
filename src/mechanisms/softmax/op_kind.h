// Causal attention as an Operator: what the laws, golden_check and the benchmark run.
#pragma once
#include "ops/operator.h"

namespace everlong::softmax {

// Kind "causal_attention". Inputs q, k, v; params scale (default 1 / sqrt(K)) and window (0: none); output "o".
// State: padded caches "k" [N, P, G, K], "v" [N, P, G, V] and "length" int64 [N], sequence n owning rows [0, length[n])
// (what lies behind them is never read; the final state has zeros there). With a window the final state keeps the last
// window - 1 rows. Forms: reference, reference_recurrent, reference_online (float64, by hand), naive, composite.
const Operator& causal_attention();

}  // namespace everlong::softmax
