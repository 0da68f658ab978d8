#include "mechanisms/megalodon/kernel_cpu.h"

#include <algorithm>

namespace everlong::megalodon {
namespace cpu {
namespace {

std::int64_t round_up(std::int64_t value) { return (value + kLanes - 1) / kLanes * kLanes; }

// Whole norm groups, together about kBlock channels; without a norm just channels.
std::int64_t groups_together(const NormEmaCall& call) {
  return std::max<std::int64_t>(1, kBlock * call.groups / call.width());
}

std::int64_t widest(const NormEmaCall& call) {
  return call.groups > 0 ? groups_together(call) * (call.width() / call.groups) : kBlock;
}

}  // namespace

std::int64_t blocks(const NormEmaCall& call) {
  const std::int64_t all = call.groups > 0 ? call.groups : call.width();
  const std::int64_t each = call.groups > 0 ? groups_together(call) : kBlock;
  return (all + each - 1) / each;
}

Block block_of(const NormEmaCall& call, std::int64_t index) {
  Block b;
  if (call.groups > 0) {
    b.group_width = call.width() / call.groups;
    b.group = index * groups_together(call);
    b.groups = std::min(groups_together(call), call.groups - b.group);
    b.channel = b.group * b.group_width;
    b.width = b.groups * b.group_width;
  } else {
    b.channel = index * kBlock;
    b.width = std::min(kBlock, call.width() - b.channel);
  }
  b.padded = round_up(b.width);
  return b;
}

std::int64_t forward_scratch(const NormEmaCall& call) {
  const std::int64_t P = round_up(widest(call));
  return P * (2 * kTile + 3 + (kPlanes + 2) * call.modes);
}

std::int64_t backward_scratch(const NormEmaCall& call) {
  const std::int64_t P = round_up(widest(call));
  return P * (3 * kSegment + 6 + (2 * kPlanes + 4) * call.modes) + 4 * (kSegment + 1) * kLanes;
}

}  // namespace cpu

std::int64_t NormEmaCall::segments() const {
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < sequences(); ++n) count += (length(n) + kSegment - 1) / kSegment;
  return count;
}

Status check_kernel_call(const NormEmaCall& c) {
  if (c.x.dtype != DType::kFloat32 && c.x.dtype != DType::kBFloat16)
    return unsupported("megalodon: the CPU kernel was given ", info(c.x.dtype).name,
                       "; it takes fp32 or bf16 (fp64: form composite)");
  if (c.width() > 1 && c.x.strides[3] != 1)
    return unsupported("megalodon: the CPU kernel needs x with a contiguous last dimension");
  if (c.groups == 0 && c.modes == 0)
    return invalid_argument("megalodon: the CPU kernel was given neither a norm nor an average");
  return {};
}

namespace {

template <class Run>
Status spread(const NormEmaCall& call, std::int64_t floats, std::span<std::byte> workspace,
              const Executor& executor, const Run& run) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  const std::int64_t bytes = floats * 4 * executor.threads();
  if (static_cast<std::int64_t>(workspace.size()) < bytes)
    return invalid_argument("megalodon: the CPU kernel was given ", workspace.size(),
                            " bytes of workspace; ", bytes, " are needed");
  auto* scratch = reinterpret_cast<float*>(workspace.data());
  executor.run(cpu::blocks(call), [&](std::int64_t index, int thread) {
    run(cpu::block_of(call, index), scratch + thread * floats);
  });
  return {};
}

}  // namespace

std::int64_t forward_workspace_bytes(const NormEmaCall& call, int threads) {
  return cpu::forward_scratch(call) * 4 * threads;
}
std::int64_t backward_workspace_bytes(const NormEmaCall& call, int threads) {
  return cpu::backward_scratch(call) * 4 * threads;
}

Status forward(const NormEmaCall& call, const NormEmaResult& result, std::span<std::byte> workspace,
               const Executor& executor) {
  return spread(call, cpu::forward_scratch(call), workspace, executor,
                [&](const cpu::Block& block, float* scratch) {
                  cpu::forward_block(call, result, block, scratch);
                });
}

Status backward(const NormEmaCall& call, const NormEmaGrads& grads, std::span<std::byte> workspace,
                const Executor& executor) {
  return spread(call, cpu::backward_scratch(call), workspace, executor,
                [&](const cpu::Block& block, float* scratch) {
                  cpu::backward_block(call, grads, block, scratch);
                });
}

}  // namespace everlong::megalodon
