#include <tuple>

#include "mechanisms/landmark/kernel_cpu_sections.h"

namespace everlong::landmark {
namespace {

// Any sections: the softmax block and a fold.
struct ForwardScratch {
  TileSections sections;
  Fold fold;

  ForwardScratch(const Plan& plan, Arena& arena)
      : sections(plan, arena),
        fold{arena.floats(kTileRows), arena.floats(kTileRows),
             arena.floats(kTileRows * sections.stride()), sections.stride()} {}
};

// Short sections, fused.
struct FusedScratch {
  float *queries, *landmarks, *gates;
  FusedForward block;

  FusedScratch(const Plan& plan, Arena& arena)
      : queries(arena.floats(kTileRows * plan.key_dim())),
        landmarks(arena.floats(kPanel * kKeyStride)),
        gates(arena.floats(kPanel * kTileRows)),
        block(plan.shape(), arena.floats(FusedForward::scratch_floats(plan.value_dim()))) {}
};

std::int64_t scratch_bytes(const Plan& plan) {
  Arena arena(nullptr);
  if (fits_fused(plan)) {
    const FusedScratch measured(plan, arena);
  } else {
    const ForwardScratch measured(plan, arena);
  }
  return arena.used();
}

void run_tile(const Plan& plan, const Tile& tile, Arena& arena, const MutableRows& o,
              const MutableRows& lse) {
  ForwardScratch scratch(plan, arena);
  const int rows = static_cast<int>(tile.rows), dim = plan.value_dim();
  begin_fold(scratch.fold);
  scratch.sections.walk(
      tile, [](std::int64_t, std::int64_t) {},
      [&](std::int64_t, const float* score, const float* inner, const float* values) {
        fold_section(scratch.fold, score, inner, values, rows, dim);
      });
  finish_fold(scratch.fold, rows, dim, o, lse);
}

void run_tile_fused(const Plan& plan, const Tile& tile, Arena& arena, const MutableRows& o,
                    const MutableRows& lse) {
  FusedScratch scratch(plan, arena);
  const auto sections = plan.sections(tile.b);
  const std::int64_t seen = tile.seen(sections);
  const Rows keys = key_rows(plan.call.k, tile.b, 0, tile.head / (plan.H / plan.G));
  const int rows = static_cast<int>(tile.rows);
  pack_queries(tile_rows(plan.call.q, tile), rows, plan.key_dim(),
               static_cast<float>(plan.call.scale) * kLog2e, scratch.queries);
  scratch.block.begin();
  SectionView view;
  for (std::int64_t first = 0; first < seen; first += kPanel) {
    const auto some = sections.subspan(static_cast<std::size_t>(first),
                                       static_cast<std::size_t>(std::min(kPanel, seen - first)));
    const auto count = static_cast<std::int64_t>(some.size());
    copy_landmarks(keys, some, plan.key_dim(), scratch.landmarks);
    gate_scores(scratch.landmarks, count, scratch.queries, plan.key_dim(), scratch.gates);
    for (std::int64_t i = 0; i < count; ++i) {
      view_section(plan, tile, some[static_cast<std::size_t>(i)], scratch.gates + i * kTileRows,
                   view);
      scratch.block.absorb(scratch.queries, rows, view);
    }
  }
  scratch.block.finish(rows, o, lse);
}

}  // namespace

Status check_kernel_call(const KernelCall& c) {
  const auto& [q, k, v] = std::tie(c.q, c.k, c.v);
  if ((q.dtype != DType::kFloat32 && q.dtype != DType::kBFloat16) || k.dtype != q.dtype ||
      v.dtype != q.dtype)
    return unsupported("landmark: the CPU kernel was given ", info(q.dtype).name, ", ",
                       info(k.dtype).name, ", ", info(v.dtype).name,
                       "; it takes fp32 or bf16, one for q, k and v");
  if (q.sizes[3] < 1 || q.sizes[3] > cpu::kMostDim || v.sizes[3] < 1 || v.sizes[3] > cpu::kMostDim)
    return unsupported("landmark: key dim ", q.sizes[3], " and value dim ", v.sizes[3],
                       "; the CPU kernel takes 1 to ", cpu::kMostDim);
  const auto contiguous = [](const ConstTensorView& x) {
    return x.sizes[3] <= 1 || x.strides[3] == 1;
  };
  if (!contiguous(q) || !contiguous(k) || !contiguous(v))
    return unsupported("landmark: the CPU kernel needs q, k, v with a contiguous last dimension");
  return {};
}

std::int64_t forward_workspace_bytes(const KernelCall& call, int threads) {
  return threads * scratch_bytes(Plan(call));
}

Status forward(const KernelCall& call, const TensorView& o, const TensorView& lse,
               std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_RETURN_IF_ERROR(check_kernel_call(call));
  EVERLONG_RETURN_IF_ERROR(
      check_workspace(workspace, forward_workspace_bytes(call, executor.threads())));
  const Plan plan(call);
  const std::int64_t bytes = scratch_bytes(plan), tiles = plan.tiles(), heads = plan.G * plan.folds;
  const TensorView lse_rows = transposed(lse);
  const bool fused = fits_fused(plan);
  spread(executor, plan.B * heads * tiles, [&](std::int64_t unit, int thread) {
    // From the last tile, the longest, to the first; those of one head together.
    const Tile tile(plan, unit / tiles / heads, tiles - 1 - unit % tiles, unit / tiles % heads);
    Arena arena(workspace.data() + thread * bytes);
    const auto run = fused ? run_tile_fused : run_tile;
    run(plan, tile, arena, tile_rows(o, tile), tile_rows(lse_rows, tile));
  });
  return {};
}

}  // namespace everlong::landmark
