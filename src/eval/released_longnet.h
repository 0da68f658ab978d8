// The steps of the released dilated attention in ATen, as a benchmark's baseline: what LongNet
// costs where it is composed of tensor operations. Source of the algorithm: microsoft/torchscale
// 4d1e0e8, torchscale/component/dilated_attention.py.
#pragma once
#include <ATen/core/Tensor.h>

#include "mechanisms/longnet/params.h"
#include "ops/operator.h"

namespace everlong {

// q, k, v [B, T, H, D], fp32 or bf16 on the CPU, bf16 or fp16 on CUDA -> [B, T, H, D]. A pattern
// pads to whole segments and heads to a multiple of the ratio, takes a diagonal copy, attends by
// torch's fused kernel, writes the rows back into zeros of full size; then the patterns are mixed
// by weights that carry no gradient. The offsets are the rule "block" whatever the geometry says.
// Differentiable. Refuses what that code gets wrong or does not do: ratios that do not divide their
// segment, `grow`, grouped heads, bidirectional attention.
Result<at::Tensor> released_dilated_attention(const at::Tensor& q_BTHD, const at::Tensor& k_BTHD,
                                              const at::Tensor& v_BTHD,
                                              const longnet::Geometry& geometry);

// The same on a call of the operator dilated_attention, timed as the form is: forward, or with the
// gradients that the call asks for. First compared with `form` at offsets "block" and gradient
// "detached" on the whole call: kUnsupported where they differ.
Result<std::function<void()>> released_longnet_work(const Operator& op, std::string_view form,
                                                    const OpCall& call);

}  // namespace everlong
