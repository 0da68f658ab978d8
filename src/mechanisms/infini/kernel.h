// Reading and writing the memory on the CPU: what stands around the local attention. Legend:
// params.h; P are the segments of a call (of all its sequences), C the tokens of each.
#pragma once
#include <cstddef>
#include <span>

#include "core/parallel.h"
#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::infini {

// q [P, C, H, K] and the local attention [P, C, H, V] of one dtype, fp32 or bf16, last dimension
// contiguous; in fp32 and contiguous: the memory before each segment M [P, G, K, V], z [P, G, K],
// gate [H, V] holding g. Where z is all zero the memory is empty.
struct ReadCall {
  ConstTensorView q, local, M, z, gate;
  bool bypass = true;  // out of an empty memory: the local attention; else (1 - g) times it
};
Status check(const ReadCall& call);
std::int64_t read_workspace_bytes(const ReadCall& call, int threads);
// out [P, C, H, V] = g mem + (1 - g) local, in the dtype of q.
Status read(const ReadCall& call, const TensorView& out, std::span<std::byte> workspace,
            const Executor& executor);

struct ReadGrads {
  ConstTensorView out;    // incoming, the dtype of q, last dimension contiguous
  TensorView q, local;    // the dtype of q, written in full
  TensorView M, z, gate;  // fp32, contiguous: [P, G, K, V], [P, G, K], [P, H, V] to be summed
};
Status read_backward(const ReadCall& call, const ReadGrads& grads, std::span<std::byte> workspace,
                     const Executor& executor);

// k [P, C, G, K], v [P, C, G, V] of one dtype; weight [P, C] fp32 contiguous, or absent for ones. A
// token of weight 0 is not read.
struct WriteCall {
  ConstTensorView k, v, weight;
};
Status check(const WriteCall& call);
std::int64_t write_workspace_bytes(const WriteCall& call, int threads);
// M [P, G, K, V] = sum w sigma(k)^T v and z [P, G, K] = sum w sigma(k) of each segment; fp32.
Status write(const WriteCall& call, const TensorView& M, const TensorView& z,
             std::span<std::byte> workspace, const Executor& executor);

struct WriteGrads {
  ConstTensorView M, z;  // incoming, fp32, contiguous
  TensorView k, v;       // the dtype of k, written in full
};
Status write_backward(const WriteCall& call, const WriteGrads& grads,
                      std::span<std::byte> workspace, const Executor& executor);

}  // namespace everlong::infini
