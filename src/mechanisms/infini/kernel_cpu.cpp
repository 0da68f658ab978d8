#include <algorithm>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/infini/kernel_cpu_simd.h"

namespace everlong::infini {
namespace {

constexpr std::int64_t kAlign = 64;
constexpr std::int64_t kUnits = 32;       // cut heads into ranges where there are fewer
constexpr std::int64_t kRangeRows = 384;  // ... of at least four tiles

std::int64_t aligned(std::int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

Status check_pair(const ConstTensorView& x, const ConstTensorView& y, const char* names) {
  if ((x.dtype != DType::kFloat32 && x.dtype != DType::kBFloat16) || y.dtype != x.dtype)
    return unsupported("infini: the CPU kernel was given ", info(x.dtype).name, " and ",
                       info(y.dtype).name, " for ", names, "; it takes fp32 or bf16, one for both");
  for (const ConstTensorView& view : {x, y})
    if (view.sizes[3] < 1 || view.sizes[3] > cpu::kMostDim ||
        (view.sizes[3] > 1 && view.strides[3] != 1))
      return unsupported("infini: a head dim of ", view.sizes[3], " with stride ", view.strides[3],
                         " for ", names, "; the CPU kernel takes 1 to ", cpu::kMostDim,
                         ", contiguous");
  return {};
}

Status check_workspace(std::span<std::byte> workspace, std::int64_t needed) {
  if (static_cast<std::int64_t>(workspace.size()) < needed ||
      reinterpret_cast<std::uintptr_t>(workspace.data()) % kAlign != 0)
    return invalid_argument("infini: a workspace of ", workspace.size(), " bytes; ", needed,
                            " are needed, aligned to 64");
  return {};
}

std::int64_t read_bytes(const ReadCall& call) {
  return aligned(read_scratch_bytes(call.q.sizes[3], call.local.sizes[3]));
}
std::int64_t write_bytes(const WriteCall& call) {
  return aligned(write_scratch_bytes(call.k.sizes[3], call.v.sizes[3]));
}

}  // namespace

Status check(const ReadCall& call) {
  return check_pair(call.q, call.local, "q and the local attention");
}
Status check(const WriteCall& call) { return check_pair(call.k, call.v, "k and v"); }

std::int64_t read_workspace_bytes(const ReadCall& call, int threads) {
  return threads * read_bytes(call);
}
std::int64_t write_workspace_bytes(const WriteCall& call, int threads) {
  return threads * write_bytes(call);
}

Status read(const ReadCall& call, const TensorView& out, std::span<std::byte> workspace,
            const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, read_workspace_bytes(call, executor.threads())));
  const std::int64_t G = call.M.sizes[1], heads = call.q.sizes[0] * G,
                     rows = call.q.sizes[1] * (call.q.sizes[2] / std::max<std::int64_t>(G, 1));
  if (heads == 0 || rows == 0) return {};
  const std::int64_t ranges =
      std::clamp<std::int64_t>(std::min(kUnits / heads, rows / kRangeRows), 1, kUnits);
  const std::int64_t range = (rows + ranges - 1) / ranges;
  executor.run(heads * ranges, [&](std::int64_t unit, int thread) {
    const std::int64_t head = unit / ranges, first = unit % ranges * range;
    read_unit(call, out, head / G, head % G, first, std::min(first + range, rows),
              workspace.data() + thread * read_bytes(call));
  });
  return {};
}

Status read_backward(const ReadCall& call, const ReadGrads& grads, std::span<std::byte> workspace,
                     const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, read_workspace_bytes(call, executor.threads())));
  const std::int64_t G = call.M.sizes[1];
  executor.run(call.q.sizes[0] * G, [&](std::int64_t head, int thread) {
    read_backward_unit(call, grads, head / G, head % G,
                       workspace.data() + thread * read_bytes(call));
  });
  return {};
}

Status write(const WriteCall& call, const TensorView& M, const TensorView& z,
             std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, write_workspace_bytes(call, executor.threads())));
  const std::int64_t G = call.k.sizes[2];
  executor.run(call.k.sizes[0] * G, [&](std::int64_t head, int thread) {
    write_unit(call, M, z, head / G, head % G, workspace.data() + thread * write_bytes(call));
  });
  return {};
}

Status write_backward(const WriteCall& call, const WriteGrads& grads,
                      std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, write_workspace_bytes(call, executor.threads())));
  const std::int64_t G = call.k.sizes[2];
  executor.run(call.k.sizes[0] * G, [&](std::int64_t head, int thread) {
    write_backward_unit(call, grads, head / G, head % G,
                        workspace.data() + thread * write_bytes(call));
  });
  return {};
}

}  // namespace everlong::infini
