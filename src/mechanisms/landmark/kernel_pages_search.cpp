#include "mechanisms/landmark/kernel_pages_search.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/landmark/kernel_pages_search.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::landmark::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, kTileBlocks>;

HWY_INLINE hn::Vec<F> load(F d, const float* from) { return hn::LoadU(d, from); }
HWY_INLINE hn::Vec<F> load(F d, const std::uint16_t* from) {  // bf16: the upper half of an fp32
  const hn::Rebind<std::uint16_t, F> half;
  const hn::RebindToUnsigned<F> bits;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(half, from))));
}

// kTiles tiles side by side: one alone would wait for its own multiply-adds.
template <int kTiles, class T>
HWY_INLINE void score_side_by_side(const float* HWY_RESTRICT q, const T* HWY_RESTRICT keys,
                                   std::int64_t dim, float scale, float* HWY_RESTRICT scores) {
  const F d;
  constexpr std::int64_t kTile = kTileBlocks;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t part = 0; part < kTile; part += lanes) {
    hn::Vec<F> sum[kTiles];
    for (int t = 0; t < kTiles; ++t) sum[t] = hn::Zero(d);
    for (std::int64_t c = 0; c < dim; ++c) {
      const auto weight = hn::Set(d, q[c]);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t)
        sum[t] = hn::MulAdd(weight, load(d, keys + (t * dim + c) * kTile + part), sum[t]);
    }
    for (int t = 0; t < kTiles; ++t)
      hn::StoreU(hn::Mul(sum[t], hn::Set(d, scale)), d, scores + t * kTile + part);
  }
}

template <class T>
void score_all(const float* q, const T* keys, std::int64_t dim, std::int64_t tiles, float scale,
               float* scores) {
  std::int64_t t = 0;
  for (; t + 4 <= tiles; t += 4)
    score_side_by_side<4>(q, keys + t * dim * kTileBlocks, dim, scale, scores + t * kTileBlocks);
  for (; t < tiles; ++t)
    score_side_by_side<1>(q, keys + t * dim * kTileBlocks, dim, scale, scores + t * kTileBlocks);
}

void score(const float* q, const std::byte* keys, bool bf16, std::int64_t dim, std::int64_t tiles,
           float scale, float* scores) {
  if (bf16)
    score_all(q, reinterpret_cast<const std::uint16_t*>(keys), dim, tiles, scale, scores);
  else
    score_all(q, reinterpret_cast<const float*>(keys), dim, tiles, scale, scores);
}

}  // namespace
}  // namespace everlong::landmark::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::landmark {

HWY_EXPORT(score);

void score_tiles(const float* q_K, const std::byte* keys, DType dtype, std::int64_t key_dim,
                 std::int64_t tiles, float scale, float* scores) {
  HWY_DYNAMIC_DISPATCH(score)
  (q_K, keys, dtype == DType::kBFloat16, key_dim, tiles, scale, scores);
}

void BestBlocks::offer(std::int64_t begin, std::span<const float> scores) {
  if (count_ == 0) return;
  if (static_cast<std::int64_t>(held_.size()) == count_) {
    bool any = false;
    for (const float s : scores) any |= s >= least_;
    if (!any) return;
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (std::size_t i = scores.size(); i-- > 0;) {  // from young to old
    const double level =
        std::isnan(scores[i]) ? -kInfinity : std::nearbyint(double{scores[i]} * per_grid_);
    const bool full = static_cast<std::int64_t>(held_.size()) == count_;
    if (full && !(level > held_.front().level)) continue;  // an older equal gives way
    if (full) {
      std::pop_heap(held_.begin(), held_.end(), better);
      held_.pop_back();
    }
    held_.push_back({level, {begin + static_cast<std::int64_t>(i), scores[i]}});
    std::push_heap(held_.begin(), held_.end(), better);
  }
  if (static_cast<std::int64_t>(held_.size()) < count_) return;
  // Nothing below it rounds to a higher level than the worst that is held.
  least_ = std::nextafter(static_cast<float>((held_.front().level + 0.4) / per_grid_),
                          -std::numeric_limits<float>::infinity());
}

std::vector<Pick> BestBlocks::rising() const {
  std::vector<Pick> picks;
  for (const Held& held : held_) picks.push_back(held.pick);
  std::ranges::sort(picks, {}, &Pick::block);
  return picks;
}

}  // namespace everlong::landmark
#endif  // HWY_ONCE
