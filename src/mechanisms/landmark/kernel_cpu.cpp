#include <algorithm>
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
  struct OfTile {
    float *queries, *gates, *block;
  };
  float *landmarks, *shared;
  OfTile tiles[FusedForward::kMostTogether] = {};

  FusedScratch(const Plan& plan, std::int64_t together, Arena& arena)
      : landmarks(arena.floats(kPanel * kKeyStride)),
        shared(arena.floats(FusedForward::shared_floats())) {
    for (OfTile& t : std::span(tiles).first(static_cast<std::size_t>(together)))
      t = {arena.floats(kTileRows * plan.key_dim()), arena.floats(kPanel * kTileRows),
           arena.floats(FusedForward::scratch_floats(plan.value_dim()))};
  }
};

// Tiles that share one copy of the sections, unless there is too little work to spread: what far
// memory costs is paid once for all of them.
std::int64_t tiles_together(const Plan& plan) {
  constexpr std::int64_t kUnits = 32;
  if (!fits_fused(plan)) return 1;
  const std::int64_t most =
      plan.key_dim() + plan.value_dim() <= 256 ? FusedForward::kMostTogether : 2;
  return std::clamp<std::int64_t>(plan.B * plan.G * plan.folds * plan.tiles() / kUnits, 1, most);
}

std::int64_t scratch_bytes(const Plan& plan) {
  Arena arena(nullptr);
  if (fits_fused(plan)) {
    const FusedScratch measured(plan, tiles_together(plan), arena);
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

// Some tiles of one head, side by side.
struct Run {
  std::int64_t b, head_fold, begin, count;
};

void run_tiles_fused(const Plan& plan, const Run& run, Arena& arena, const TensorView& o,
                     const TensorView& lse) {
  const FusedScratch scratch(plan, run.count, arena);
  const auto tile = [&](std::int64_t i) { return Tile(plan, run.b, run.begin + i, run.head_fold); };
  const auto block = [&](std::int64_t i) {
    return FusedForward(plan.shape(), scratch.shared, scratch.tiles[i].block);
  };
  const auto sections = plan.sections(run.b);
  const Rows keys = key_rows(plan.call.k, run.b, 0, tile(0).head / (plan.H / plan.G));
  for (std::int64_t i = 0; i < run.count; ++i) {
    const Tile t = tile(i);
    pack_queries(tile_rows(plan.call.q, t), static_cast<int>(t.rows), plan.key_dim(),
                 static_cast<float>(plan.call.scale) * kLog2e, scratch.tiles[i].queries);
    block(i).begin();
  }
  SectionView view;
  const std::int64_t seen = tile(run.count - 1).seen(sections);
  for (std::int64_t first = 0; first < seen; first += kPanel) {
    const auto some = sections.subspan(static_cast<std::size_t>(first),
                                       static_cast<std::size_t>(std::min(kPanel, seen - first)));
    const auto count = static_cast<std::int64_t>(some.size());
    copy_landmarks(keys, some, plan.key_dim(), scratch.landmarks);
    for (std::int64_t i = 0; i < run.count; ++i)
      gate_scores(scratch.landmarks, count, scratch.tiles[i].queries, plan.key_dim(),
                  scratch.tiles[i].gates);
    for (std::int64_t j = 0; j < count; ++j) {
      const Section& section = some[static_cast<std::size_t>(j)];
      bool loaded = false, finite = true;
      for (std::int64_t i = 0; i < run.count; ++i) {
        const Tile t = tile(i);
        if (section.begin > t.last) continue;
        view_section(plan, t, section, scratch.tiles[i].gates + j * kTileRows, view);
        if (!loaded) finite = block(i).load(view.k, view.v, view.count);
        loaded = true;
        block(i).absorb(scratch.tiles[i].queries, static_cast<int>(t.rows), view, finite);
      }
    }
  }
  for (std::int64_t i = 0; i < run.count; ++i) {
    const Tile t = tile(i);
    block(i).finish(static_cast<int>(t.rows), tile_rows(o, t), tile_rows(lse, t));
  }
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
  const std::int64_t bytes = scratch_bytes(plan), tiles = plan.tiles(),
                     together = tiles_together(plan), runs = parts(tiles, together),
                     heads = plan.G * plan.folds;
  const TensorView lse_rows = transposed(lse);
  const bool fused = fits_fused(plan);
  spread(executor, plan.B * heads * runs, [&](std::int64_t unit, int thread) {
    // From the last tiles, the longest, to the first; those of one head together.
    const std::int64_t begin = (runs - 1 - unit % runs) * together;
    const Run run{unit / runs / heads, unit / runs % heads, begin,
                  std::min(together, tiles - begin)};
    Arena arena(workspace.data() + thread * bytes);
    if (fused) {
      run_tiles_fused(plan, run, arena, o, lse_rows);
    } else {
      const Tile tile(plan, run.b, run.begin, run.head_fold);
      run_tile(plan, tile, arena, tile_rows(o, tile), tile_rows(lse_rows, tile));
    }
  });
  return {};
}

}  // namespace everlong::landmark
