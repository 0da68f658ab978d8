// One tile of queries against the sections of its past, one after the other: what forward and
// backward share.
#pragma once
#include <limits>

#include "mechanisms/landmark/kernel_cpu_fused.h"
#include "mechanisms/landmark/kernel_cpu_gate.h"
#include "mechanisms/landmark/kernel_cpu_plan.h"

namespace everlong::landmark {

inline constexpr float kLog2e = 1.44269504F;

// Sections that the fused kernels take: all of a call, or none. A handful of rows (decoding) is
// better off with the softmax block, which reads keys where they lie.
inline bool fits_fused(const Plan& plan) {
  constexpr std::int64_t kFewRows = 4;
  return std::min(plan.T, plan.tokens) * plan.fold > kFewRows &&
         std::ranges::all_of(plan.call.sections,
                             [](const Section& s) { return s.content() <= cpu::kTileKeys; });
}

// A section as the rows of a tile see it; `gate` as SectionView says.
inline void view_section(const Plan& plan, const Tile& tile, const Section& section,
                         const float* gate, SectionView& view) {
  const std::int64_t head = tile.head / (plan.H / plan.G);
  view.k = key_rows(plan.call.k, tile.b, section.begin, head);
  view.v = key_rows(plan.call.v, tile.b, section.begin, head);
  view.count = section.content();
  view.gate = gate;
  view.drop_empty = plan.call.drop_empty;
  // Nearly all sections of a long text: no row by row, whose positions take a division each.
  view.whole = tile.rows == kTileRows && is_past(section, tile.first);
  if (view.whole) {
    std::fill_n(view.seen, kTileRows, static_cast<std::int32_t>(section.content()));
    std::fill_n(view.past, kTileRows, 1.0F);
    return;
  }
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    const bool row = r < tile.rows;
    const std::int64_t before = row ? tile.position(r) + 1 - section.begin : 0;
    view.seen[r] =
        static_cast<std::int32_t>(std::clamp<std::int64_t>(before, 0, section.content()));
    view.past[r] = row && is_past(section, tile.position(r)) ? 1.0F : 0.0F;
  }
}

class TileSections {
 public:
  static constexpr std::int64_t padded(std::int64_t dim) { return (dim + 31) / 32 * 32; }

  TileSections(const Plan& plan, Arena& arena)
      : plan_(plan),
        stride_(padded(plan.value_dim())),
        queries_(arena.floats(kTileRows * plan.key_dim())),
        landmarks_(arena.floats(kPanel * kKeyStride)),
        gates_(arena.floats(kPanel * kTileRows)),
        values_(arena.floats(kTileRows * stride_)),
        inner_(arena.floats(kTileRows)),
        score_(arena.floats(kTileRows)),
        block_(plan.shape(),
               arena.bytes(cpu::SoftmaxForward::scratch_bytes(plan.key_dim(), plan.value_dim()))) {}

  std::int64_t stride() const { return stride_; }
  const float* landmarks() const { return landmarks_; }  // of the current panel

  // Calls visit(section index, score [rows], inner [rows], values [rows][stride]) for every section
  // that some row of the tile sees: `score` is the section's as a whole, -inf where a row sees
  // nothing of it; `inner` its tokens' log-sum-exp, `values` their mean by weight. Before each
  // panel of landmarks calls panel(first section, count).
  template <class Panel, class Visit>
  void walk(const Tile& tile, const Panel& panel, const Visit& visit) {
    const auto sections = plan_.sections(tile.b);
    const std::int64_t seen = tile.seen(sections), head = tile.head / (plan_.H / plan_.G);
    const Rows q = tile_rows(plan_.call.q, tile);
    const int rows = static_cast<int>(tile.rows);
    pack_queries(q, rows, plan_.key_dim(), static_cast<float>(plan_.call.scale), queries_);
    block_.begin(q, rows);
    for (std::int64_t first = 0; first < seen; first += kPanel) {
      const std::int64_t count = std::min(kPanel, seen - first);
      const auto some =
          sections.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      copy_landmarks(key_rows(plan_.call.k, tile.b, 0, head), some, plan_.key_dim(), landmarks_);
      gate_scores(landmarks_, count, queries_, plan_.key_dim(), gates_);
      panel(first, count);
      for (std::int64_t i = 0; i < count; ++i) {
        const Section& section = some[static_cast<std::size_t>(i)];
        sight_.set(tile, section.begin);
        block_.restart();
        block_.absorb(
            {key_rows(plan_.call.k, tile.b, section.begin, head),
             key_rows(plan_.call.v, tile.b, section.begin, head), section.content(), nullptr},
            sight_.view());
        block_.finish({values_, DType::kFloat32, stride_, 0, 1},
                      {inner_, DType::kFloat32, 1, 0, 1});
        for (std::int64_t r = 0; r < tile.rows; ++r) score_[r] = whole(section, tile, i, r);
        visit(first + i, score_, inner_, values_);
      }
    }
  }

 private:
  float whole(const Section& section, const Tile& tile, std::int64_t i, std::int64_t r) const {
    if (!is_past(section, tile.position(r))) return inner_[r];
    return plan_.call.drop_empty && section.content() == 0 ? -std::numeric_limits<float>::infinity()
                                                           : gates_[i * kTileRows + r];
  }

  const Plan& plan_;
  std::int64_t stride_;
  float *queries_, *landmarks_, *gates_, *values_, *inner_, *score_;
  cpu::SoftmaxForward block_;
  SectionSight sight_;
};

}  // namespace everlong::landmark
