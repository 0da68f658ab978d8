// Whole sequences on every GPU from sm_80 on: host side of kernel_cuda_sweep.cuh.
#include <cuda_runtime.h>

#include <algorithm>

#include "mechanisms/lightning/kernel_cuda_check.h"
#include "mechanisms/lightning/kernel_cuda_sweep.cuh"

namespace everlong::lightning {
namespace {

using sweep::Launch;

int processors() {
  int device = 0, count = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

// Everything of a sweep besides its tensors.
struct Job {
  const CudaTensors& call;
  double scale;
  void* workspace;
  void* stream;
};

sweep::Rows rows_of(const ConstTensorView& x) {
  return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}
sweep::States states_of(const ConstTensorView& x, bool transposed) {
  const int row = transposed ? 3 : 2, column = transposed ? 2 : 3;
  return {static_cast<float*>(const_cast<void*>(x.data)), x.strides[0], x.strides[1],
          x.strides[row], x.strides[column]};
}
// Whether rows can be moved 16 bytes at a time.
bool is_aligned(const ConstTensorView& x) {
  const auto size = static_cast<std::int64_t>(info(x.dtype).bytes);
  bool fits = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.sizes[3] * size % 16 == 0;
  for (int dim = 0; dim < 3; ++dim)
    fits = fits && (x.sizes[static_cast<std::size_t>(dim)] == 1 ||
                    x.strides[static_cast<std::size_t>(dim)] * size % 16 == 0);
  return fits;
}

template <class Element, int kX>
cudaError_t launch(Launch p, std::int64_t units, std::int64_t longest, const Job& job) {
  using S = sweep::Sweep<Element, kX>;
  constexpr int kBytes = sizeof(typename S::Shared);
  const auto kernel = sweep::sweep_kernel<Element, kX>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess)
    return error;
  p.column_blocks = (p.Z + S::kColumns - 1) / S::kColumns;
  // Few blocks leave the GPU empty: two for each processor. A part is worth it from 8 chunks on.
  const std::int64_t chunks = (longest + S::kChunk - 1) / S::kChunk,
                     blocks = units * p.column_blocks;
  p.parts = 1;
  if (job.workspace != nullptr && units < processors())
    p.parts = static_cast<int>(
        std::max<std::int64_t>(1, std::min<std::int64_t>(2 * processors() / blocks, chunks / 8)));
  // One part may end before another starts.
  if (p.in.data != nullptr && p.in.data == p.out.data) p.parts = 1;
  if (blocks * p.parts > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto start = [&](std::int64_t parts) {
    kernel<<<static_cast<unsigned>(blocks * parts), sweep::kThreads, kBytes,
             static_cast<cudaStream_t>(job.stream)>>>(p);
  };
  if (p.parts > 1) {
    p.state_only = true;
    start(p.parts - 1);
    p.state_only = false;
  }
  start(p.parts);
  return cudaGetLastError();
}

template <class Element>
cudaError_t with_padded_dim(const Launch& p, std::int64_t units, std::int64_t longest,
                            const Job& job) {
  if (p.X <= 64) return launch<Element, 64>(p, units, longest, job);
  if (p.X <= 128) return launch<Element, 128>(p, units, longest, job);
  return launch<Element, 256>(p, units, longest, job);
}

// o of (x, y, z), as kernel_cuda_sweep.cuh says; the states' rows are the columns of x.
Status run(const Job& job, const ConstTensorView& x, const ConstTensorView& y,
           const ConstTensorView& z, const ConstTensorView& o, const sweep::States& in,
           const sweep::States& out, bool reverse) {
  const CudaTensors& call = job.call;
  Launch p{};
  p.x = rows_of(x);
  p.y = rows_of(y);
  p.z = rows_of(z);
  p.o = rows_of(o);
  p.in = in;
  p.out = out;
  p.tokens = x.sizes[1];
  p.heads = static_cast<int>(x.sizes[2]);
  p.X = static_cast<int>(x.sizes[3]);
  p.Z = static_cast<int>(z.sizes[3]);
  p.first_token = call.packing.cu_seqlens.empty() ? nullptr : call.packing.offsets;
  p.reverse = reverse;
  p.aligned = is_aligned(x) && is_aligned(y) && is_aligned(z) && is_aligned(o);
  p.carried = static_cast<float*>(job.workspace);
  p.scale = static_cast<float>(job.scale);
  std::int64_t longest = p.tokens;
  const auto cu = call.packing.cu_seqlens;
  if (!cu.empty()) longest = 0;
  for (std::size_t i = 1; i < cu.size(); ++i) longest = std::max(longest, cu[i] - cu[i - 1]);
  for (std::size_t h = 0; h < call.slope_H.size(); ++h)
    p.slope[h] = static_cast<float>(call.slope_H[h]);

  const std::int64_t units = call.sequences() * x.sizes[2];
  cudaError_t error = cudaSuccess;
  switch (x.dtype) {
    case DType::kFloat32:
      error = with_padded_dim<float>(p, units, longest, job);
      break;
    case DType::kBFloat16:
      error = with_padded_dim<__nv_bfloat16>(p, units, longest, job);
      break;
    default:
      error = with_padded_dim<__half>(p, units, longest, job);
  }
  if (error == cudaSuccess) return {};
  return unsupported("lightning: the CUDA sweep could not be launched: ",
                     cudaGetErrorString(error));
}

Status validate(const CudaTensors& call) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  const DType dtype = call.q_BTHK.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16)
    return unsupported("lightning: the CUDA sweep takes fp32, bf16 and fp16; given ",
                       info(dtype).name);
  const std::int64_t K = call.q_BTHK.sizes[3], V = call.v_BTHV.sizes[3];
  if (K < 1 || K > kCudaMaxDim || V < 1 || V > kCudaMaxDim)
    return unsupported("lightning: the CUDA sweep takes head dims up to ", kCudaMaxDim,
                       "; given K = ", K, ", V = ", V);
  const auto dense = [](const ConstTensorView& x) { return x.strides[3] == 1 || x.sizes[3] == 1; };
  if (!dense(call.q_BTHK) || !dense(call.k_BTHK) || !dense(call.v_BTHV) ||
      !std::ranges::all_of(call.like_q, dense) || !std::ranges::all_of(call.like_v, dense))
    return invalid_argument("lightning: the last dimension of every tensor must be contiguous");
  return {};
}

}  // namespace

Status cuda_sweep_forward(const CudaForward& call, void* stream) {
  const ConstTensorView like_v[] = {call.o_BTHV},
                        states[] = {call.state_in_NHKV, call.state_out_NHKV};
  const CudaTensors tensors{call.q_BTHK, call.k_BTHK, call.v_BTHV,  {},
                            like_v,      states,      call.slope_H, call.packing};
  EVERLONG_RETURN_IF_ERROR(validate(tensors));
  if (call.fused.any())
    return unsupported("lightning: the CUDA sweep computes neither silu nor row squares");
  return run({tensors, call.scale, call.workspace, stream}, call.q_BTHK, call.k_BTHK, call.v_BTHV,
             call.o_BTHV, states_of(call.state_in_NHKV, false),
             states_of(call.state_out_NHKV, false), false);
}

Status cuda_sweep_backward(const CudaBackward& call, void* stream) {
  const ConstTensorView like_q[] = {call.grad_q_BTHK, call.grad_k_BTHK},
                        like_v[] = {call.grad_v_BTHV, call.grad_o_BTHV},
                        states[] = {call.state_in_NHKV, call.grad_state_NHKV,
                                    call.grad_state_in_NHKV};
  const CudaTensors tensors{call.q_BTHK, call.k_BTHK, call.v_BTHV,  like_q,
                            like_v,      states,      call.slope_H, call.packing};
  EVERLONG_RETURN_IF_ERROR(validate(tensors));
  const Job job{tensors, call.scale, call.workspace, stream};
  EVERLONG_RETURN_IF_ERROR(run(job, call.grad_o_BTHV, call.v_BTHV, call.k_BTHK, call.grad_q_BTHK,
                               states_of(call.state_in_NHKV, true), {}, false));
  EVERLONG_RETURN_IF_ERROR(run(job, call.v_BTHV, call.grad_o_BTHV, call.q_BTHK, call.grad_k_BTHK,
                               states_of(call.grad_state_NHKV, true), {}, true));
  // Last: it may write over the state's gradient that the sweep before has read.
  return run(job, call.k_BTHK, call.q_BTHK, call.grad_o_BTHV, call.grad_v_BTHV,
             states_of(call.grad_state_NHKV, false), states_of(call.grad_state_in_NHKV, false),
             true);
}

}  // namespace everlong::lightning
