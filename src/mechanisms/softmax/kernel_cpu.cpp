#include <tuple>

#include "mechanisms/softmax/kernel.h"
#include "mechanisms/softmax/kernel_cpu_plan.h"

namespace everlong::softmax {

Status check_kernel_call(const KernelCall& c) {
  const auto& [q, k, v] = std::tie(c.q, c.k, c.v);
  if ((q.dtype != DType::kFloat32 && q.dtype != DType::kBFloat16) || k.dtype != q.dtype ||
      v.dtype != q.dtype)
    return unsupported("softmax: the CPU kernel was given ", info(q.dtype).name, ", ",
                       info(k.dtype).name, ", ", info(v.dtype).name,
                       "; it takes fp32 or bf16, one for q, k and v");
  if (q.sizes[3] < 1 || q.sizes[3] > cpu::kMostDim || v.sizes[3] < 1 || v.sizes[3] > cpu::kMostDim)
    return unsupported("softmax: key dim ", q.sizes[3], " and value dim ", v.sizes[3],
                       "; the CPU kernel takes 1 to ", cpu::kMostDim);
  const auto contiguous = [](const ConstTensorView& x) {
    return x.sizes[3] <= 1 || x.strides[3] == 1;
  };
  if (!contiguous(q) || !contiguous(k) || !contiguous(v))
    return unsupported("softmax: the CPU kernel needs q, k, v with a contiguous last dimension");
  return {};
}

namespace {

// Tiles that share one copy of the keys: as many as fit a core's second cache (1 MB), unless there
// is too little work to spread.
std::int64_t tiles_together(const Plan& plan) {
  constexpr std::int64_t kUnits = 32;
  std::int64_t tiles = 0;
  for (std::int64_t n = 0; n < plan.sequences; ++n) tiles += plan.tiles(n);
  const cpu::SoftmaxShape shape = plan.shape();
  const std::int64_t most =
      shape.key_dim + shape.value_dim <= 256 ? cpu::SoftmaxForward::kMostTogether : 2;
  return std::clamp<std::int64_t>(tiles * plan.G * plan.folds / kUnits, 1, most);
}

std::int64_t tile_bytes(const Plan& plan) {
  const cpu::SoftmaxShape shape = plan.shape();
  return aligned(cpu::SoftmaxForward::scratch_bytes(shape.key_dim, shape.value_dim));
}

}  // namespace

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads) {
  const Plan plan(call);
  return aligned((plan.sequences + 1) * 8) + threads * tiles_together(plan) * tile_bytes(plan);
}

Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, forward_workspace_bytes(call, executor.threads())));
  const Plan plan(call);
  const std::int64_t together = tiles_together(plan), bytes = tile_bytes(plan);
  std::byte* next = workspace.data();
  const std::int64_t* sums = count_units(plan, together, next);
  const TensorView lse_rows = transposed(lse);
  spread(executor, sums[plan.sequences] * plan.G * plan.folds, [&](std::int64_t index, int thread) {
    const Unit unit = Unit::of(plan, sums, together, index);
    std::byte* scratch = next + thread * together * bytes;
    const auto block = [&](std::int64_t i) {
      return cpu::SoftmaxForward(plan.shape(), scratch + i * bytes);
    };
    cpu::SoftmaxForward blocks[] = {block(0), block(1), block(2), block(3)};
    TileSight sights[cpu::SoftmaxForward::kMostTogether];
    cpu::Sight views[cpu::SoftmaxForward::kMostTogether];
    const auto count = static_cast<std::size_t>(unit.tile_end - unit.tile_begin);
    const auto tile = [&](std::size_t i) {
      return Tile(plan, unit.n, unit.tile_begin + static_cast<std::int64_t>(i), unit.fold);
    };
    for (std::size_t i = 0; i < count; ++i) {
      const Tile t = tile(i);
      blocks[i].begin(tile_rows(plan, call.q, t), static_cast<int>(t.rows));
      sights[i].set(plan, t, 0);
      views[i] = sights[i].view();
    }
    const std::int64_t key_head = unit.fold / plan.folds;
    cpu::SoftmaxForward::absorb_together(
        {blocks, count},
        {key_rows(plan, call.k, unit.n, 0, key_head), key_rows(plan, call.v, unit.n, 0, key_head),
         plan.keys(unit.n), nullptr},
        {views, count});
    for (std::size_t i = 0; i < count; ++i)
      blocks[i].finish(tile_rows(plan, o, tile(i)), tile_rows(plan, lse_rows, tile(i)));
  });
  return {};
}

}  // namespace everlong::softmax
