// The chunk engine on Hopper, host side: how the work is shared out.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "kernels/cuda/tensor_map.h"
#include "mechanisms/lightning/kernel_sm90_engine.cuh"
#include "mechanisms/lightning/kernel_sm90_gradients.cuh"

namespace everlong::lightning {
namespace {

using engine::kChunk;
using engine::kMaxRanges;
using engine::Launch;
using engine::StateRows;
using Sizes = std::array<std::int64_t, 4>;

// One pass over all sequences, in or against time.
struct Pass {
  Sizes sizes_BTHK;
  std::int64_t V;
  StateRows in, out;
  std::span<const double> slope_H;
  double scale;
  bool exact;
  void* workspace;
  CudaPacking packing;
};

constexpr int chunks_of(std::int64_t tokens) {
  return static_cast<int>((tokens + kChunk - 1) / kChunk);
}

// Costs in chunks at the rate of a GPU whose memory is busy, as measured. A chunk that only the
// state sees moves two tiles of four; in front of others it costs more than that. A block alone on
// the memory takes 0.65 for a chunk, the time of its products, and 0.37 where only the state sees
// it.
constexpr double kStateOnly = 0.5, kWarmUp = 0.9, kAlone = 0.65, kStateAlone = 0.37;
constexpr double kStart = 2.5, kSecondLaunch = 5;  // of a part, of a kernel

struct Plan {
  int ranges = 0, parts = 1;  // as in Launch
  std::array<int, kMaxRanges + 1> cut;
};

// Cuts the line into `ranges` ranges of at most `budget` each; returns what is left over. warm[h]:
// chunks of warm-up of a range that starts within head h.
int cut_line(int chunks, int line, int ranges, double budget, std::span<const int> warm, int* cut) {
  const int heads = static_cast<int>(warm.size());
  int position = 0;
  for (int i = 0; i < ranges; ++i) {
    cut[i] = position;
    const int unit = position / chunks, before = position - unit * chunks;
    const int taken = static_cast<int>(
        budget - kWarmUp * std::min(before, warm[static_cast<std::size_t>(unit % heads)]));
    if (taken > 0) position = std::min(line, position + taken);
  }
  cut[ranges] = position;
  return line - position;
}

Plan make_plan(const Pass& pass, int chunks, int units, int processors) {
  Plan plan;
  const double share = static_cast<double>(units) * chunks / processors;  // of the whole line
  // Blocks of one length share the memory; at the end the last round is what is left.
  const auto cost = [&](std::int64_t blocks, double length) {
    const double rounds = static_cast<double>((blocks + processors - 1) / processors);
    return std::max(static_cast<double>(blocks) * length / processors, kAlone * rounds * length);
  };
  std::array<int, kCudaMaxHeads> warm;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    warm[h] = engine::warm_chunks(static_cast<float>(pass.slope_H[h]));
  const std::span<const int> warm_H(warm.data(), pass.slope_H.size());
  // The states of all parts but the last, one block each.
  const auto states_cost = [&](int parts, int length) {
    double sum = 0;
    int longest = 0;
    for (const int warm_h : warm_H) {
      const int used = pass.exact ? length : std::min(length, warm_h);
      sum += used;
      longest = std::max(longest, used);
    }
    const double heads = static_cast<double>(warm_H.size());
    return std::max(sum / heads * units * (parts - 1) / processors * kStateOnly,
                    longest * kStateAlone);
  };
  double best = cost(units, chunks);
  if (pass.workspace != nullptr && units < processors)
    for (const int parts : {processors / units, processors / units + 1, 2 * processors / units}) {
      if (parts < 2 || parts > chunks || parts > kMaxRanges) continue;
      const int length = (chunks + parts - 1) / parts;
      const int rounds = (units * parts + processors - 1) / processors;
      const double both = cost(std::int64_t{units} * parts, length) + states_cost(parts, length) +
                          kSecondLaunch + kStart * rounds;
      if (both < best) best = both, plan.parts = parts;
    }
  if (pass.exact || best <= share * 1.001) return plan;

  // The least budget that reaches the end of the line, from below.
  for (double budget = share + 1; budget < best;) {
    const int left = cut_line(chunks, units * chunks, processors, budget, warm_H, plan.cut.data());
    if (left == 0) {
      plan.ranges = processors;
      plan.parts = 1;
      return plan;
    }
    budget += std::max(static_cast<double>(left) / processors, 0.001 * share);
  }
  return plan;
}

// The same for packed sequences. exact: cuts between units only.
int cut_packed_line(std::span<const std::int64_t> cu_seqlens, int line, int ranges, double budget,
                    std::span<const int> warm, bool exact, int* cut) {
  const int heads = static_cast<int>(warm.size());
  int position = 0, before = 0;  // before: chunks of the sequences ahead of this one
  std::size_t sequence = 0;
  const auto chunks = [&] { return chunks_of(cu_seqlens[sequence + 1] - cu_seqlens[sequence]); };
  const auto find = [&](int place) {
    while (place >= before + heads * chunks()) before += heads * chunks(), ++sequence;
  };
  for (int i = 0; i < ranges; ++i) {
    cut[i] = position;
    if (position == line) continue;
    find(position);
    const int head = (position - before) / chunks(), ahead = (position - before) % chunks();
    const int taken =
        static_cast<int>(budget - kWarmUp * std::min(ahead, warm[static_cast<std::size_t>(head)]));
    int next = std::min(line, position + std::max(taken, 0));
    if (exact && next < line) {
      find(next);
      const int start = next - (next - before) % chunks();
      next = start > position ? start : start + chunks();
    }
    position = next;
  }
  cut[ranges] = position;
  return line - position;
}

Plan plan_packed(const Pass& pass, int processors) {
  Plan plan;
  std::array<int, kCudaMaxHeads> warm;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    warm[h] = engine::warm_chunks(static_cast<float>(pass.slope_H[h]));
  const auto cu = pass.packing.cu_seqlens;
  int line = 0;
  for (std::size_t i = 1; i < cu.size(); ++i) line += chunks_of(cu[i] - cu[i - 1]);
  line *= static_cast<int>(pass.slope_H.size());
  plan.ranges = processors;
  const double share = static_cast<double>(line) / processors;
  for (double budget = share + 1;;) {
    const int left =
        cut_packed_line(cu, line, processors, budget, {warm.data(), pass.slope_H.size()},
                        pass.exact, plan.cut.data());
    if (left == 0) return plan;
    budget += std::max(static_cast<double>(left) / processors, 0.001 * share + 1);
  }
}

// carried [units, parts, size]: of each part alone -> of all up to its end. Chunks of all but the
// first part are full ones (against time, the short one is in the first). Grid (units, any).
__global__ void add_up_parts(const __grid_constant__ Launch p) {
  constexpr int kAtOnce = 8;  // loads in flight
  __shared__ float lost[kMaxRanges];
  const int size = p.K * p.V, unit = static_cast<int>(blockIdx.x), last = p.parts - 1;
  for (int part = static_cast<int>(threadIdx.x); part < last; part += blockDim.x) {
    const std::int64_t chunks = p.chunks, from = chunks * part / p.parts,
                       to = chunks * (part + 1) / p.parts;
    lost[part] = expm1f(-p.slope[unit % p.heads] * static_cast<float>((to - from) * kChunk));
  }
  __syncthreads();
  float* carried = p.carried + static_cast<std::int64_t>(unit) * p.parts * size;
  for (int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); i < size;
       i += static_cast<int>(gridDim.y * blockDim.x)) {
    float sum = 0;
    for (int first = 0; first < last; first += kAtOnce) {
      float own[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        own[j] = first + j < last ? carried[std::int64_t{first + j} * size + i] : 0.0f;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < last) {
          sum += fmaf(sum, lost[first + j], own[j]);
          carried[std::int64_t{first + j} * size + i] = sum;
        }
    }
  }
}

int processors() {
  int device = 0, count = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::clamp(count, 1, kMaxRanges);
}

Launch make_launch(const Pass& pass) {
  const auto [B, T, H, K] = pass.sizes_BTHK;
  Launch p{};
  p.in = pass.in;
  p.out = pass.out;
  p.tokens = static_cast<int>(T);
  p.heads = static_cast<int>(H);
  p.chunks = chunks_of(T);
  p.K = static_cast<int>(K);
  p.V = static_cast<int>(pass.V);
  p.scale = static_cast<float>(pass.scale);
  p.carried = static_cast<float*>(pass.workspace);
  p.exact = pass.exact;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    p.slope[h] = static_cast<float>(pass.slope_H[h]);
  const auto packed = pass.packing.cu_seqlens;
  if (!packed.empty()) {
    p.sequences = static_cast<int>(packed.size()) - 1;
    p.first_token = pass.packing.offsets;
    p.first_chunk = pass.packing.offsets + packed.size();
  }
  const Plan plan = packed.empty()
                        ? make_plan(pass, p.chunks, static_cast<int>(B * H), processors())
                        : plan_packed(pass, processors());
  p.ranges = plan.ranges;
  p.parts = plan.parts;
  if (p.ranges > 0) std::copy_n(plan.cut.begin(), p.ranges + 1, p.cut);
  return p;
}

// The kernel over all blocks; with parts, first for their states.
template <class Shape, class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, Launch p, std::int64_t units, void* stream,
                   const std::tuple<Arguments...>& arguments) {
  constexpr int kBytes = sizeof(typename Shape::Shared);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const auto start = [&](std::int64_t blocks) {
    std::apply(
        [&](const auto&... argument) {
          kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, kBytes, on>>>(argument..., p);
        },
        arguments);
  };
  if (p.parts > 1) {
    p.state_only = true;
    start(units * (p.parts - 1));
    p.state_only = false;
    add_up_parts<<<dim3(static_cast<unsigned>(units), 64), 256, 0, on>>>(p);
  }
  start(p.ranges > 0 ? p.ranges : units * p.parts);
  return cudaGetLastError();
}

// Calls function(keys, values) with the padded dims as constants.
template <class Function>
cudaError_t with_padded_dims(const Launch& p, const Function& function) {
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 96> k96;
  constexpr std::integral_constant<int, 128> k128;
  if (p.K > 64 && p.K <= 96 && p.V > 64 && p.V <= 96) return function(k96, k96);
  if (p.K <= 64) return p.V <= 64 ? function(k64, k64) : function(k64, k128);
  return p.V <= 64 ? function(k128, k64) : function(k128, k128);
}

Status as_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return unsupported("lightning: the Hopper kernel could not be launched: ",
                     cudaGetErrorString(error));
}

engine::OutputRows output_rows(const ConstTensorView& x) {
  return {static_cast<__nv_bfloat16*>(const_cast<void*>(x.data)), x.strides[1], x.strides[2]};
}

Status run_forward(const ConstTensorView& q_view, const ConstTensorView& k_view,
                   const ConstTensorView& v_view, const ConstTensorView& o_view, const Pass& pass,
                   void* stream) {
  EVERLONG_ASSIGN(const CUtensorMap q, cuda::tiles_of(q_view, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap k, cuda::tiles_of(k_view, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap v, cuda::tiles_of(v_view, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap o, cuda::tiles_of(o_view, engine::kOutRows));
  const Launch p = make_launch(pass);
  return as_status(with_padded_dims(p, [&](auto keys, auto values) {
    return launch<engine::Forward<keys, values>>(engine::forward_kernel<keys, values>, p,
                                                 pass.sizes_BTHK[0] * pass.sizes_BTHK[2], stream,
                                                 std::tuple(q, k, v, o, output_rows(o_view)));
  }));
}

Status validate(const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& v,
                std::span<const ConstTensorView> like_q, std::span<const ConstTensorView> like_v,
                std::span<const ConstTensorView> states, std::span<const double> slope_H,
                const CudaPacking& packing) {
  const auto [B, T, H, K] = q.sizes;
  const auto cu = packing.cu_seqlens;
  const std::int64_t N = cu.empty() ? B : static_cast<std::int64_t>(cu.size()) - 1;
  const std::int64_t V = v.sizes[3];
  const auto fits = [](std::int64_t dim) { return dim >= 8 && dim <= 128 && dim % 8 == 0; };
  if (!fits(K) || !fits(V))
    return unsupported(
        "lightning: the Hopper kernel takes head dims of multiples of 8 up to 128; given K = ", K,
        ", V = ", V);
  if (H < 1 || H > kCudaMaxHeads)
    return unsupported("lightning: the Hopper kernel takes up to ", kCudaMaxHeads, " heads; given ",
                       H);
  if (B < 1 || T < 1 || k.sizes != q.sizes || v.sizes != Sizes{B, T, H, V})
    return invalid_argument(
        "lightning: the Hopper kernel takes q, k [B, T, H, K] and v [B, T, H, V]");
  const auto is_like = [](const ConstTensorView& model) {
    return [&](const ConstTensorView& x) { return x && x.sizes == model.sizes; };
  };
  if (!q || !k || !v || !std::ranges::all_of(like_q, is_like(q)) ||
      !std::ranges::all_of(like_v, is_like(v)))
    return invalid_argument(
        "lightning: outputs and gradients have the shapes of what they belong to");
  for (const ConstTensorView& state : states)
    if (state && (state.dtype != DType::kFloat32 || state.sizes != Sizes{N, H, K, V}))
      return invalid_argument("lightning: states are fp32 [N, H, K, V], N the sequences");
  if (static_cast<std::int64_t>(slope_H.size()) != H)
    return invalid_argument("lightning: ", slope_H.size(), " slopes for ", H, " heads");
  if (!cu.empty() && (B != 1 || cu.front() != 0 || cu.back() != T || !std::ranges::is_sorted(cu) ||
                      packing.offsets == nullptr))
    return invalid_argument(
        "lightning: packed sequences lie in B = 1 with offsets that rise from 0 to T, here and on "
        "the device");
  constexpr std::int64_t kMost = INT32_MAX / 2;
  if (T > kMost || B > kMost / H || (T + kChunk - 1) / kChunk + N > kMost / (B * H))
    return unsupported("lightning: ", B, " sequences of ", T, " tokens and ", H,
                       " heads are too many for one call; split the batch");
  return {};
}

StateRows rows_of(const ConstTensorView& x) {
  return {static_cast<float*>(const_cast<void*>(x.data)), x.strides[0], x.strides[1], x.strides[2],
          x.strides[3]};
}

}  // namespace

Status cuda_forward(const CudaForward& call, void* stream) {
  const ConstTensorView like_v[] = {call.o_BTHV},
                        states[] = {call.state_in_NHKV, call.state_out_NHKV};
  EVERLONG_RETURN_IF_ERROR(validate(call.q_BTHK, call.k_BTHK, call.v_BTHV, {}, like_v, states,
                                    call.slope_H, call.packing));
  return run_forward(call.q_BTHK, call.k_BTHK, call.v_BTHV, call.o_BTHV,
                     {call.q_BTHK.sizes, call.v_BTHV.sizes[3], rows_of(call.state_in_NHKV),
                      rows_of(call.state_out_NHKV), call.slope_H, call.scale, call.exact,
                      call.workspace, call.packing},
                     stream);
}

Status cuda_backward(const CudaBackward& call, void* stream) {
  const ConstTensorView like_q[] = {call.grad_q_BTHK, call.grad_k_BTHK},
                        like_v[] = {call.grad_v_BTHV, call.grad_o_BTHV},
                        states[] = {call.state_in_NHKV, call.grad_state_NHKV,
                                    call.grad_state_in_NHKV};
  EVERLONG_RETURN_IF_ERROR(validate(call.q_BTHK, call.k_BTHK, call.v_BTHV, like_q, like_v, states,
                                    call.slope_H, call.packing));
  EVERLONG_ASSIGN(const CUtensorMap q, cuda::tiles_of(call.q_BTHK, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap k, cuda::tiles_of(call.k_BTHK, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap v, cuda::tiles_of(call.v_BTHV, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap grad_o, cuda::tiles_of(call.grad_o_BTHV, kChunk));
  EVERLONG_ASSIGN(const CUtensorMap grad_k, cuda::tiles_of(call.grad_k_BTHK, engine::kOutRows));
  EVERLONG_ASSIGN(const CUtensorMap grad_v, cuda::tiles_of(call.grad_v_BTHV, engine::kOutRows));
  // dQ is the forward pass of (dO, V, K), whose state is S transposed.
  StateRows transposed = rows_of(call.state_in_NHKV);
  std::swap(transposed.row, transposed.column);
  const Pass for_q{call.v_BTHV.sizes, call.q_BTHK.sizes[3], transposed, {},
                   call.slope_H,      call.scale,           call.exact, call.workspace,
                   call.packing};
  EVERLONG_RETURN_IF_ERROR(
      run_forward(call.grad_o_BTHV, call.v_BTHV, call.k_BTHK, call.grad_q_BTHK, for_q, stream));
  const Pass for_k_and_v{call.q_BTHK.sizes,
                         call.v_BTHV.sizes[3],
                         rows_of(call.grad_state_NHKV),
                         rows_of(call.grad_state_in_NHKV),
                         call.slope_H,
                         call.scale,
                         call.exact,
                         call.workspace,
                         call.packing};
  const Launch p = make_launch(for_k_and_v);
  return as_status(with_padded_dims(p, [&](auto keys, auto values) {
    return launch<engine::Gradients<keys, values>>(
        engine::gradients_kernel<keys, values>, p, call.q_BTHK.sizes[0] * call.q_BTHK.sizes[2],
        stream,
        std::tuple(q, k, v, grad_o, grad_k, grad_v, output_rows(call.grad_k_BTHK),
                   output_rows(call.grad_v_BTHV)));
  }));
}

void cuda_offsets(std::span<const std::int64_t> cu_seqlens, std::span<std::int32_t> offsets) {
  std::int32_t chunks = 0;
  for (std::size_t i = 0; i < cu_seqlens.size(); ++i) {
    if (i > 0) chunks += chunks_of(cu_seqlens[i] - cu_seqlens[i - 1]);
    offsets[i] = static_cast<std::int32_t>(cu_seqlens[i]);
    offsets[cu_seqlens.size() + i] = chunks;
  }
}

std::int64_t cuda_workspace_bytes(std::int64_t sequences, std::int64_t heads, std::int64_t key_dim,
                                  std::int64_t value_dim) {
  const std::int64_t units = sequences * heads;
  const std::int64_t most = units >= processors() ? 0 : 2 * processors() + units;
  return 4 * most * key_dim * value_dim;
}

}  // namespace everlong::lightning
