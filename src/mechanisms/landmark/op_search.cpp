#include "mechanisms/landmark/op_search.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <ranges>

#include "mechanisms/landmark/kernel_search.h"

namespace everlong::landmark {

at::Tensor search_blocks(const at::Tensor& q_nmStHK, const at::Tensor& keys_nGcK,
                         const Retrieval& retrieval, std::int64_t first_local, double scale) {
  const std::int64_t n = q_nmStHK.size(0), m = q_nmStHK.size(1), t = q_nmStHK.size(3),
                     H = q_nmStHK.size(4), K = q_nmStHK.size(5), G = keys_nGcK.size(1), R = H / G;
  const Frame first(retrieval, first_local);
  const std::int64_t P = first.picks,
                     rest = (kTileBlocks - keys_nGcK.size(2) % kTileBlocks) % kTileBlocks;
  // [n, m, G, S, t R, K] and [n, G, tiles, K, 16]
  const at::Tensor queries =
      q_nmStHK.to(at::kFloat).unflatten(4, {G, R}).permute({0, 1, 4, 2, 3, 5, 6}).contiguous();
  const at::Tensor tiles = at::constant_pad_nd(keys_nGcK.to(at::kFloat), {0, 0, 0, rest})
                               .unflatten(2, {-1, kTileBlocks})
                               .transpose(-1, -2)
                               .contiguous();
  const at::Tensor found = at::empty({n, m, t, H, P}, q_nmStHK.options().dtype(at::kLong));
  const auto* q = queries.const_data_ptr<float>();
  const auto* keys = tiles.const_data_ptr<float>();
  auto* out = found.mutable_data_ptr<std::int64_t>();
  at::parallel_for(0, n * m * G, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t group = unit / G, g = unit % G, row = group / m;
      const Frame frame(retrieval, first_local + group % m);
      const TiledKeys tiled{
          reinterpret_cast<const std::byte*>(keys + (row * G + g) * tiles.stride(1)),
          DType::kFloat32, K, first.oldest};
      std::vector<BestBlocks> best(static_cast<std::size_t>(t * R), {P, kScoreGrid32});
      const auto scans = scans_of(frame, q + unit * queries.stride(2), t * R * K);
      for (const Scan& scan : std::views::reverse(scans)) offer_scores(tiled, scan, scale, best);
      for (std::int64_t i = 0; i < t * R; ++i) {
        auto* to = out + (((group * t) + i / R) * H + g * R + i % R) * P;
        for (const Pick& pick : best[static_cast<std::size_t>(i)].rising()) *to++ = pick.block;
      }
    }
  });
  return found;
}

}  // namespace everlong::landmark
