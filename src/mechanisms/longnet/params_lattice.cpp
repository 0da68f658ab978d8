#include "mechanisms/longnet/params_lattice.h"

#include <algorithm>

namespace everlong::longnet {

std::vector<LatticeRun> make_runs(const Geometry& geometry, std::size_t pattern,
                                  std::int64_t offset, std::int64_t position, std::int64_t tokens) {
  // No structured binding: clang 14 lets no lambda take one.
  const std::int64_t w = geometry.patterns[pattern].segment, r = geometry.patterns[pattern].ratio;
  const std::int64_t from = geometry.active_from(pattern), end = position + tokens;
  std::vector<LatticeRun> runs;
  const auto add = [&](std::int64_t t, std::int64_t segments) {
    const std::int64_t start = t * w;
    const std::int64_t before = std::max(position - start, std::int64_t{0});
    LatticeRun run;
    run.segments = segments;
    run.past = lattice_rows(before, offset, r);
    const std::int64_t all = lattice_rows(std::min(end - start, w), offset, r);
    run.keys = all - run.past;
    run.key_token = start + offset + run.past * r - position;
    const std::int64_t idle = lattice_rows(std::max(from - start, std::int64_t{0}), offset, r);
    run.queries = all - std::max(run.past, idle);
    if (geometry.phantom) run.phantom = (std::min(w, tokens) + r - 1) / r - all;
    if (run.queries <= 0) return;
    if (!runs.empty()) {
      LatticeRun& last = runs.back();
      if (last.key_token + last.segments * w == run.key_token && last.keys == run.keys &&
          last.queries == run.queries && last.past == run.past && last.phantom == run.phantom) {
        last.segments += run.segments;
        return;
      }
    }
    runs.push_back(run);
  };
  if (tokens == 0) return runs;
  // Only the first segment has a past or idle queries, and only the last is cut short.
  const std::int64_t first = position / w, last = (end - 1) / w;
  add(first, 1);
  if (last - first > 1) add(first + 1, last - first - 1);
  if (last > first) add(last, 1);
  return runs;
}

std::vector<HeadClass> head_classes(OffsetRule rule, std::int64_t kv_heads, std::int64_t ratio) {
  std::vector<HeadClass> classes;
  if (rule == OffsetRule::kMod) {
    for (std::int64_t s = 0; s < std::min(ratio, kv_heads); ++s)
      classes.push_back({s, s, ratio, (kv_heads - 1 - s) / ratio + 1});
    return classes;
  }
  for (std::int64_t head = 0; head < kv_heads;) {
    const std::int64_t offset = offset_of(rule, head, kv_heads, ratio);
    std::int64_t next = head + 1;
    while (next < kv_heads && offset_of(rule, next, kv_heads, ratio) == offset) ++next;
    classes.push_back({offset, head, 1, next - head});
    head = next;
  }
  return classes;
}

double visible_pairs(const Geometry& geometry, std::int64_t kv_heads, std::int64_t past,
                     std::int64_t tokens) {
  double pairs = 0;
  for (std::size_t i = 0; i < geometry.patterns.size(); ++i)
    for (const HeadClass& c :
         head_classes(geometry.offset_rule, kv_heads, geometry.patterns[i].ratio))
      for (const LatticeRun& run : make_runs(geometry, i, c.offset, past, tokens)) {
        const auto queries = static_cast<double>(run.queries),
                   keys = static_cast<double>(run.all_keys());
        const double seen =
            geometry.causal ? queries * keys - queries * (queries - 1) / 2 : queries * keys;
        pairs += seen * static_cast<double>(run.segments * c.count);
      }
  return pairs;
}

}  // namespace everlong::longnet
