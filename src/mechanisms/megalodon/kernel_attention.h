// Causal attention of queries that are the last of their keys, on the shared softmax block: what
// one chunk is, or a batch of chunks. Values wider than the block takes are attended slice by
// slice.
//
// Nothing is allocated; the bits do not depend on the number of threads.
#pragma once
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::megalodon {

// q [R, T, H, K], k [R, S, H, K], v [R, S, H, V], S >= T >= 1; query t sees the keys up to S - T +
// t. fp32 or bf16, one for all, the last dimension contiguous. K up to 256, any V.
struct AttentionCall {
  ConstTensorView q, k, v;
  std::int64_t rows() const { return q.sizes[0]; }
  std::int64_t queries() const { return q.sizes[1]; }
  std::int64_t heads() const { return q.sizes[2]; }
  std::int64_t key_dim() const { return q.sizes[3]; }
  std::int64_t keys() const { return k.sizes[1]; }
  std::int64_t value_dim() const { return v.sizes[3]; }
};
Status check_attention_call(const AttentionCall& call);

// o [R, T, H, V] in the dtype of q; lse fp32 [1, R, H, T], may be absent.
std::int64_t attention_forward_bytes(const AttentionCall& call, int threads);
Status attention_forward(const AttentionCall& call, const TensorView& o, const TensorView& lse,
                         std::span<std::byte> workspace, const Executor& executor);

struct AttentionGrads {
  ConstTensorView o, lse, grad_o;     // o and lse of the forward
  TensorView grad_q, grad_k, grad_v;  // written in full, dtype of q
};
std::int64_t attention_backward_bytes(const AttentionCall& call, int threads);
Status attention_backward(const AttentionCall& call, const AttentionGrads& grads,
                          std::span<std::byte> workspace, const Executor& executor);

}  // namespace everlong::megalodon
