// Decayed linear attention on NVIDIA GPUs, from sm_80 on. Torch-free: views, and streams as void*
// (cudaStream_t).
//
//   S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t        (README.md section 1)
//
// Every function launches on the current device, waits for nothing and allocates nothing, so a
// CUDA graph can capture it. Views are not owned and must live until the stream has done the work.
// Legend: B batch, T tokens, H heads, K key dim, V value dim, N rows of the states.
#pragma once
#include <cstdint>
#include <span>

#include "core/status.h"
#include "core/tensor_view.h"

namespace everlong::lightning {

// Slopes travel with the launch, by value: no copy to the device, no synchronisation.
inline constexpr std::int64_t kCudaMaxHeads = 512;
inline constexpr std::int64_t kCudaMaxKeyDim = 4096;  // the step keeps one q and k in shared memory

// One token for each of B sequences.
struct CudaStep {
  ConstTensorView q_B1HK, k_B1HK, v_B1HV;  // fp32, bf16 or fp16, one dtype
  TensorView o_B1HV;                       // dtype of v
  ConstTensorView state_in_NHKV;           // fp32; null: zero
  TensorView state_out_NHKV;  // fp32; may be state_in itself (in place), else must not overlap it
  // On the device: sequence b's row of the states, N may then differ from B. A row outside [0, N)
  // marks an empty place: its output is zero and no state is touched. Null: row b. Two sequences
  // must not share a row.
  const std::int64_t* slot_B = nullptr;
  std::span<const double> slope_H;  // on the host, nats per token, >= 0
  double scale = 1.0;
};

// Reads and writes every element of the states in use once. Bitwise the same whatever else is in
// the batch. Refuses what does not fit, before any work.
Status cuda_step(const CudaStep& call, void* stream);

// One token for each of B sequences, writing states behind: a state is read for every token, but
// written once in R tokens, when the keys and values that wait in its ring are folded in. With r
// tokens waiting, of age r .. 1 when the new one (age 0) arrives:
//   o = scale (lambda^(r+1) S^T q + sum_{i <= r} lambda^(r-i) (q . k_i) v_i)
// The ring holds what arrived, unrounded; R = 16 halves the traffic of a step, and longer rings
// lose again what they save.
inline constexpr std::int64_t kCudaMaxRing = 64, kCudaRingMaxKeyDim = 256;

struct CudaRingStep {
  // As in CudaStep. q null: nothing arrives and all that waits is folded in; k, v and o are then
  // not looked at.
  ConstTensorView q_B1HK, k_B1HK, v_B1HV;
  TensorView o_B1HV;
  TensorView state_NHKV;              // fp32, written where a ring is full
  TensorView keys_NHRK, values_NHRV;  // the rings, of the dtype of k
  // On the device: tokens in each ring, in [0, R). Not changed: when the step is done the caller
  // counts one more, and 0 where that makes R (after a fold of all: 0). So a model counts once a
  // token for all its layers, and a CUDA graph replays.
  const std::int32_t* waiting_N = nullptr;
  const std::int64_t* slot_B = nullptr;  // as in CudaStep
  std::int64_t batch = 0;                // B where q is null
  std::span<const double> slope_H;
  double scale = 1.0;
};
Status cuda_ring_step(const CudaRingStep& call, void* stream);

// Whole sequences, T >= 1. States are fp32 with free strides. Deterministic, bit by bit. Two
// kernels take the same calls:
//   cuda_forward, cuda_backward     the chunk engine of kernel_sm90_engine.cuh: Hopper (sm_90)
//       alone, bf16, K and V multiples of 8; strides as in kernels/cuda/tensor_map.h
//   cuda_sweep_forward, _backward   kernel_cuda_sweep.cuh: sm_80 and later, bf16, fp16 and fp32,
//       any K and V, free strides of all dimensions but the last. Every token counts, whatever
//       `exact` says.
inline constexpr std::int64_t kCudaMaxDim = 256;  // K and V of both

// N sequences packed into B = 1. Empty ones are legal; nothing is written for them, states
// included.
struct CudaPacking {
  std::span<const std::int64_t> cu_seqlens = {};  // N+1 offsets on the host; empty: N = B
  const std::int32_t* offsets = nullptr;          // cuda_offsets() of them, on the device
};
// Fills 2 (N+1) numbers, from sorted offsets.
void cuda_offsets(std::span<const std::int64_t> cu_seqlens, std::span<std::int32_t> offsets);

// What the chunk engine does besides, in the time in which it waits for memory; for K and V up to
// kCudaMaxFusedDim.
inline constexpr std::int64_t kCudaMaxFusedDim = 128;
struct CudaFused {
  // x / (1 + exp(-x)) of q, k, v as they are read, rounded to their dtype.
  bool silu_q = false, silu_k = false, silu_v = false;
  // Sums of o^2 over V before o is rounded, [B, H, T] contiguous on the device; null: not wanted.
  float* row_squares_BHT = nullptr;
  bool any_silu() const { return silu_q || silu_k || silu_v; }
  bool any() const { return any_silu() || row_squares_BHT != nullptr; }
};

struct CudaForward {
  ConstTensorView q_BTHK, k_BTHK, v_BTHV;
  TensorView o_BTHV;
  ConstTensorView state_in_NHKV = {};  // null: zero
  TensorView state_out_NHKV = {};      // null: not wanted; may be state_in itself
  std::span<const double> slope_H;
  double scale = 1.0;
  // False: a long line may be cut into ranges that start from the tokens of the last 30 ln 2 / s
  // only: what lies further back counts less than 2^-30. True: every token counts.
  bool exact = false;
  // cuda_workspace_bytes() on the device, 16-byte aligned, contents irrelevant. Null: calls of few
  // heads are slower.
  void* workspace = nullptr;
  CudaPacking packing = {};
  CudaFused fused = {};  // cuda_forward() alone; the sweep refuses any
};
Status cuda_forward(const CudaForward& call, void* stream);
Status cuda_sweep_forward(const CudaForward& call, void* stream);

// Gradients of <o, grad_o> + <state_out, grad_state>. Everything is read again and nothing kept by
// the forward pass; each gradient is written once.
struct CudaBackward {
  ConstTensorView q_BTHK, k_BTHK, v_BTHV, grad_o_BTHV;
  ConstTensorView state_in_NHKV = {}, grad_state_NHKV = {};  // null: zero
  TensorView grad_q_BTHK, grad_k_BTHK, grad_v_BTHV;
  TensorView grad_state_in_NHKV = {};  // null: not wanted; may be grad_state itself
  std::span<const double> slope_H;
  double scale = 1.0;
  bool exact = false;         // as in CudaForward
  void* workspace = nullptr;  // as in CudaForward
  CudaPacking packing = {};
};
Status cuda_backward(const CudaBackward& call, void* stream);
Status cuda_sweep_backward(const CudaBackward& call, void* stream);

// For any of them, on the current device.
std::int64_t cuda_workspace_bytes(std::int64_t sequences, std::int64_t heads, std::int64_t key_dim,
                                  std::int64_t value_dim);

}  // namespace everlong::lightning
