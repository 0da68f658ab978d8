#include "mechanisms/landmark/kernel_search.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/landmark/kernel_search.cpp"
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

// Sums in registers at a time: kQueries x kTiles. One alone would wait for its own multiply-adds.
constexpr int kQueries = 4;
constexpr int kTiles = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4 ? 2 : 4;

// Scores of Q queries and N tiles; row i of scores is `stride` long. most [Q][16]: by lane, the
// largest so far; in this order of Max a NaN is passed over or stays, by target.
template <int Q, int N, class T>
HWY_INLINE void score_side_by_side(const float* HWY_RESTRICT q, const T* HWY_RESTRICT keys,
                                   std::int64_t dim, float scale, std::int64_t stride,
                                   float* HWY_RESTRICT scores, float* HWY_RESTRICT most) {
  const F d;
  constexpr std::int64_t kTile = kTileBlocks;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t part = 0; part < kTile; part += lanes) {
    hn::Vec<F> sum[Q][N];
    for (int i = 0; i < Q; ++i)
      for (int t = 0; t < N; ++t) sum[i][t] = hn::Zero(d);
    for (std::int64_t c = 0; c < dim; ++c) {
      hn::Vec<F> key[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) key[t] = load(d, keys + (t * dim + c) * kTile + part);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) {
        const auto weight = hn::Set(d, q[i * dim + c]);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) sum[i][t] = hn::MulAdd(weight, key[t], sum[i][t]);
      }
    }
    for (int i = 0; i < Q; ++i) {
      auto largest = hn::LoadU(d, most + i * kTile + part);
      for (int t = 0; t < N; ++t) {
        const auto score = hn::Mul(sum[i][t], hn::Set(d, scale));
        hn::StoreU(score, d, scores + i * stride + t * kTile + part);
        largest = hn::Max(score, largest);
      }
      hn::StoreU(largest, d, most + i * kTile + part);
    }
  }
}

template <int Q, class T>
void score_row_of_tiles(const float* q, const T* keys, std::int64_t dim, std::int64_t tiles,
                        float scale, float* scores, float* highest) {
  const std::int64_t stride = tiles * kTileBlocks;
  float most[Q * kTileBlocks];
  std::fill_n(most, Q * kTileBlocks, -std::numeric_limits<float>::infinity());
  std::int64_t t = 0;
  for (; t + kTiles <= tiles; t += kTiles)
    score_side_by_side<Q, kTiles>(q, keys + t * dim * kTileBlocks, dim, scale, stride,
                                  scores + t * kTileBlocks, most);
  for (; t < tiles; ++t)
    score_side_by_side<Q, 1>(q, keys + t * dim * kTileBlocks, dim, scale, stride,
                             scores + t * kTileBlocks, most);
  for (int i = 0; i < Q; ++i) {
    highest[i] = most[i * kTileBlocks];
    for (std::int64_t j = 1; j < kTileBlocks; ++j) {
      const float lane = most[i * kTileBlocks + j];
      if (lane > highest[i] || std::isnan(lane)) highest[i] = lane;
      if (std::isnan(highest[i])) break;
    }
  }
}

template <class T>
void score_all(const float* q, std::int64_t count, const T* keys, std::int64_t dim,
               std::int64_t tiles, float scale, float* scores, float* highest) {
  const std::int64_t stride = tiles * kTileBlocks;
  std::int64_t i = 0;
  for (; i + kQueries <= count; i += kQueries)
    score_row_of_tiles<kQueries>(q + i * dim, keys, dim, tiles, scale, scores + i * stride,
                                 highest + i);
  for (; i < count; ++i)
    score_row_of_tiles<1>(q + i * dim, keys, dim, tiles, scale, scores + i * stride, highest + i);
}

void score(const float* q, std::int64_t count, const TiledKeys& keys, std::int64_t tiles,
           float scale, float* scores, float* highest) {
  if (keys.dtype == DType::kBFloat16)
    score_all(q, count, reinterpret_cast<const std::uint16_t*>(keys.tiles), keys.key_dim, tiles,
              scale, scores, highest);
  else
    score_all(q, count, reinterpret_cast<const float*>(keys.tiles), keys.key_dim, tiles, scale,
              scores, highest);
}

}  // namespace
}  // namespace everlong::landmark::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::landmark {

HWY_EXPORT(score);

void score_tiles(const float* q_nK, std::int64_t count, const TiledKeys& keys, std::int64_t tiles,
                 float scale, float* scores_n16, float* highest_n) {
  HWY_DYNAMIC_DISPATCH(score)(q_nK, count, keys, tiles, scale, scores_n16, highest_n);
}

void BestBlocks::offer(std::int64_t begin, std::span<const float> scores, float highest) {
  if (count_ == 0) return;
  bool full = static_cast<std::int64_t>(held_.size()) == count_;
  if (full && highest < least_) return;
  for (std::size_t i = scores.size(); i-- > 0;) {  // from young to old
    if (full && !(scores[i] >= least_)) continue;
    const double level =
        std::isnan(scores[i]) ? -kInfinity : std::nearbyint(double{scores[i]} * per_grid_);
    if (full) {
      if (!(level > held_.front().level)) continue;  // an older equal gives way
      std::pop_heap(held_.begin(), held_.end(), better);
      held_.pop_back();
    }
    held_.push_back({level, {begin + static_cast<std::int64_t>(i), scores[i]}});
    std::push_heap(held_.begin(), held_.end(), better);
    full = static_cast<std::int64_t>(held_.size()) == count_;
    // Nothing below it rounds to a higher level than the worst that is held.
    if (full)
      least_ = std::nextafter(static_cast<float>((held_.front().level + 0.4) / per_grid_),
                              -std::numeric_limits<float>::infinity());
  }
}

std::vector<Pick> BestBlocks::rising() const {
  std::vector<Pick> picks;
  for (const Held& held : held_) picks.push_back(held.pick);
  std::ranges::sort(picks, {}, &Pick::block);
  return picks;
}

std::vector<Scan> scans_of(const Frame& frame, const float* q_SnK, std::int64_t slot_stride) {
  const std::int64_t recent = frame.first_local - frame.picks;
  std::vector<Scan> scans{{q_SnK, frame.oldest, recent}};
  for (std::int64_t b = recent; b < frame.first_local; ++b)
    scans.push_back({q_SnK + frame.slot(b) * slot_stride, b, b + 1});
  return scans;
}

void offer_scores(const TiledKeys& keys, const Scan& scan, double scale,
                  std::span<BestBlocks> best) {
  // Tiles and queries taken together: their keys and scores stay in the first-level cache.
  constexpr std::int64_t kMostTiles = 16, kMostQueries = 8;
  float scores[kMostQueries * kMostTiles * kTileBlocks], highest[kMostQueries];
  const std::int64_t tile_bytes =
      keys.key_dim * kTileBlocks * static_cast<std::int64_t>(info(keys.dtype).bytes);
  const auto queries = static_cast<std::int64_t>(best.size());
  for (std::int64_t end = scan.end - keys.first; end > scan.begin - keys.first;) {
    const std::int64_t last = (end - 1) / kTileBlocks;
    const std::int64_t piece = last / kMostTiles * kMostTiles * kTileBlocks;
    const std::int64_t begin = std::max(piece, scan.begin - keys.first);
    const std::int64_t first = begin / kTileBlocks, tiles = last + 1 - first;
    TiledKeys some = keys;
    some.tiles += first * tile_bytes;
    for (std::int64_t i = 0; i < queries; i += kMostQueries) {
      const std::int64_t count = std::min(kMostQueries, queries - i);
      score_tiles(scan.q_nK + i * keys.key_dim, count, some, tiles, static_cast<float>(scale),
                  scores, highest);
      for (std::int64_t j = 0; j < count; ++j)
        best[static_cast<std::size_t>(i + j)].offer(
            keys.first + begin,
            {scores + ((j * tiles - first) * kTileBlocks + begin),
             static_cast<std::size_t>(end - begin)},
            highest[j]);
    }
    end = begin;
  }
}

}  // namespace everlong::landmark
#endif  // HWY_ONCE
