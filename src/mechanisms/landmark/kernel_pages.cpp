#include "mechanisms/landmark/kernel_pages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "mechanisms/landmark/kernel_pages_segment.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {
namespace {

// Blocks. A fork copies at most so many keys; a lookup reads 10^6 keys of 16 numbers in 8 ms, with
// 64 in 14 ms and with 1024 in 11 ms (2026-11-23, busy machine): memory likes long rows.
constexpr std::int64_t kMostSegment = 256;

// Element i of a row as fp32.
float element(const std::byte* row, DType dtype, std::int64_t i) {
  float value = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&value, row + 4 * i, 4);
  } else {
    std::uint16_t half = 0;
    std::memcpy(&half, row + 2 * i, 2);
    const std::uint32_t bits = std::uint32_t{half} << 16;
    std::memcpy(&value, &bits, 4);
  }
  return value;
}

const std::byte* row_of(const ConstTensorView& x, std::int64_t head, std::int64_t row) {
  return static_cast<const std::byte*>(x.data) + (head * x.strides[1] + row * x.strides[2]) *
                                                     static_cast<std::int64_t>(info(x.dtype).bytes);
}

Status check_view(const char* name, const ConstTensorView& x, const PageShape& s,
                  std::int64_t dim) {
  const bool fits = x && x.dtype == s.dtype && x.sizes[0] == 1 && x.sizes[1] == s.kv_heads &&
                    x.sizes[2] == s.block && x.sizes[3] == dim && (x.strides[3] == 1 || dim == 1);
  if (fits) return {};
  return invalid_argument("landmark pages: ", name, " is ", info(x.dtype).name, " [", x.sizes[0],
                          ", ", x.sizes[1], ", ", x.sizes[2], ", ", x.sizes[3], "]; ",
                          info(s.dtype).name, " [1, ", s.kv_heads, ", ", s.block, ", ", dim,
                          "] with contiguous rows is needed");
}

float largest_norm(const ConstTensorView& v, std::int64_t head, std::int64_t tokens,
                   std::int64_t dim) {
  double largest = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      const double x = element(row_of(v, head, t), v.dtype, i);
      sum += x * x;
    }
    largest = largest > sum ? largest : sum;  // a NaN comes through: nothing is certified then
  }
  return std::nextafter(static_cast<float>(std::sqrt(largest)),
                        std::numeric_limits<float>::infinity());
}

void prefetch_lines(const std::byte* from, std::int64_t bytes) {
  constexpr std::int64_t kLine = 64, kMost = 16384;
  for (std::int64_t at = 0; at < std::min(bytes, kMost); at += kLine) __builtin_prefetch(from + at);
}

}  // namespace

std::int64_t BlockPages::segment_blocks(std::int64_t max_blocks) {
  if (max_blocks <= 0 || max_blocks >= 4 * kMostSegment) return kMostSegment;
  return std::max((max_blocks / 4 + kTileBlocks - 1) / kTileBlocks, std::int64_t{1}) * kTileBlocks;
}

BlockPages::BlockPages(std::shared_ptr<PageStore> store, std::int64_t max_blocks,
                       std::int64_t first)
    : store_(std::move(store)),
      max_blocks_(max_blocks),
      per_segment_(segment_blocks(max_blocks)),
      first_(first),
      end_(first) {}

BlockPages::~BlockPages() = default;  // pages that a saved state names keep their records

BlockPages::Segments BlockPages::snapshot() const {
  Segments all = segments_;
  if (!all.empty() && all.back()->blocks < per_segment_) all.back() = all.back()->copy();
  return all;
}

BlockPages BlockPages::fork() const {
  BlockPages other(store_, max_blocks_);
  other.first_ = first_;
  other.end_ = end_;
  other.first_segment_ = first_segment_;
  other.segments_ = snapshot();
  return other;
}

const BlockPages::Segment& BlockPages::segment_of(std::int64_t block) const {
  return *segments_[static_cast<std::size_t>(block / per_segment_ - first_segment_)];
}

Status BlockPages::check_kept(std::int64_t begin, std::int64_t end) const {
  if (begin >= first_ && end <= end_) return {};
  return not_found("landmark pages: blocks [", begin, ", ", end, ") are asked for; [", first_, ", ",
                   end_, ") are kept");
}

Status BlockPages::check_head(std::int64_t head) const {
  if (head >= 0 && head < shape().kv_heads) return {};
  return invalid_argument("landmark pages: head ", head, " of ", shape().kv_heads);
}

Status BlockPages::append(const ConstTensorView& k_GLK, const ConstTensorView& v_GLV) {
  const PageShape& s = shape();
  EVERLONG_RETURN_IF_ERROR(check_view("k", k_GLK, s, s.key_dim));
  EVERLONG_RETURN_IF_ERROR(check_view("v", v_GLV, s, s.value_dim));
  std::vector<std::byte> page(static_cast<std::size_t>(s.page_bytes()));
  std::vector<PageStore::Page> pages;
  for (std::int64_t g = 0; g < s.kv_heads; ++g) {
    std::byte* to = page.data();
    for (const auto& [x, dim] : {std::pair{&k_GLK, s.key_dim}, {&v_GLV, s.value_dim}})
      for (std::int64_t t = 0; t < s.tokens(); ++t, to += dim * s.element())
        std::memcpy(to, row_of(*x, g, t), static_cast<std::size_t>(dim * s.element()));
    const auto added = store_->add(end_, g, page);
    if (!added.ok()) {
      for (const auto earlier : pages) store_->release(earlier);
      return added.status().at(cat("block ", end_));
    }
    pages.push_back(*added);
  }
  Segment& segment = open_segment();
  for (std::int64_t g = 0; g < s.kv_heads; ++g)
    segment.add_head(g, row_of(k_GLK, g, s.tokens()),
                     largest_norm(v_GLV, g, s.tokens(), s.value_dim));
  segment.add_pages(pages);
  ++end_;
  drop_old();
  return {};
}

BlockPages::Segment& BlockPages::open_segment() {
  if (!segments_.empty() && segments_.back()->blocks < per_segment_) return *segments_.back();
  if (segments_.empty()) first_segment_ = end_ / per_segment_;
  segments_.push_back(std::make_shared<Segment>(store_, per_segment_));
  segments_.back()->skip_blocks(end_ % per_segment_);
  return *segments_.back();
}

void BlockPages::drop_old() {
  if (max_blocks_ <= 0 || end_ - first_ <= max_blocks_) return;
  first_ = end_ - max_blocks_;
  const std::int64_t gone = first_ / per_segment_ - first_segment_;
  segments_.erase(segments_.begin(), segments_.begin() + gone);
  first_segment_ += gone;
}

// Young to old: visit(keys of a segment, the part of the scan that lies there).
template <class Visit>
void BlockPages::visit_segments(std::int64_t head, const Scan& scan, const Visit& visit) const {
  const std::int64_t head_bytes = per_segment_ * shape().key_dim * shape().element();
  for (std::int64_t end = scan.end; end > scan.begin;) {
    const std::int64_t start = (end - 1) / per_segment_ * per_segment_;
    const std::int64_t begin = std::max(start, scan.begin);
    // Segments lie anywhere in memory: the processor cannot guess the next one.
    if (begin > scan.begin) prefetch_lines(segment_of(begin - 1).tile(head, 0), head_bytes);
    visit(TiledKeys{segment_of(begin).tile(head, 0), shape().dtype, shape().key_dim, start},
          Scan{scan.q_nK, begin, end});
    end = begin;
  }
}

Status BlockPages::search(std::int64_t head, std::span<const Scan> scans, std::int64_t queries,
                          double scale, std::int64_t count,
                          std::vector<std::vector<Pick>>& picks) const {
  EVERLONG_RETURN_IF_ERROR(check_head(head));
  std::vector<Scan> ordered;
  for (const Scan& scan : scans)
    if (scan.begin < scan.end) ordered.push_back(scan);
  std::ranges::sort(ordered, std::ranges::greater{}, &Scan::begin);
  for (std::size_t i = 0; i < ordered.size(); ++i) {
    EVERLONG_RETURN_IF_ERROR(check_kept(ordered[i].begin, ordered[i].end));
    if (i > 0 && ordered[i].end > ordered[i - 1].begin)
      return invalid_argument("landmark pages: block ", ordered[i - 1].begin,
                              " is in two scans; each block is scored once");
  }
  std::vector<BestBlocks> best(static_cast<std::size_t>(queries), {count, kScoreGrid32});
  for (const Scan& scan : ordered)
    visit_segments(head, scan, [&](const TiledKeys& keys, const Scan& part) {
      offer_scores(keys, part, scale, best);
    });
  picks.clear();
  for (const BestBlocks& of_query : best) picks.push_back(of_query.rising());
  return {};
}

Status BlockPages::scores(std::int64_t head, const Scan& scan, double scale,
                          std::span<float> out) const {
  EVERLONG_RETURN_IF_ERROR(check_head(head));
  EVERLONG_RETURN_IF_ERROR(check_kept(scan.begin, scan.end));
  if (static_cast<std::int64_t>(out.size()) != scan.end - scan.begin)
    return invalid_argument("landmark pages: room for ", out.size(), " scores of ",
                            scan.end - scan.begin);
  float scores[kMostSegment], highest = 0;
  visit_segments(head, scan, [&](const TiledKeys& keys, const Scan& part) {
    const std::int64_t count = part.end - keys.first;
    score_tiles(part.q_nK, 1, keys, (count + kTileBlocks - 1) / kTileBlocks,
                static_cast<float>(scale), scores, &highest);
    std::copy(scores + (part.begin - keys.first), scores + count,
              out.begin() + (part.begin - scan.begin));
  });
  return {};
}

Status BlockPages::landmark(std::int64_t block, std::int64_t head, std::span<float> out) const {
  EVERLONG_RETURN_IF_ERROR(check_head(head));
  EVERLONG_RETURN_IF_ERROR(check_kept(block, block + 1));
  if (static_cast<std::int64_t>(out.size()) != shape().key_dim)
    return invalid_argument("landmark pages: room for ", out.size(), " numbers of a key of ",
                            shape().key_dim);
  const std::int64_t at = block % per_segment_;
  const std::byte* tile = segment_of(block).tile(head, at / kTileBlocks);
  for (std::int64_t c = 0; c < shape().key_dim; ++c)
    out[static_cast<std::size_t>(c)] =
        element(tile, shape().dtype, c * kTileBlocks + at % kTileBlocks);
  return {};
}

Result<float> BlockPages::value_norm(std::int64_t block, std::int64_t head) const {
  EVERLONG_RETURN_IF_ERROR(check_head(head));
  EVERLONG_RETURN_IF_ERROR(check_kept(block, block + 1));
  return segment_of(block).norm(block % per_segment_, head);
}

Result<PinnedPage> BlockPages::read(std::int64_t block, std::int64_t head, double mass) const {
  EVERLONG_RETURN_IF_ERROR(check_head(head));
  EVERLONG_RETURN_IF_ERROR(check_kept(block, block + 1));
  auto pinned = store_->pin(segment_of(block).page(block % per_segment_, head), mass);
  if (!pinned.ok()) return pinned.status().at(cat("block ", block, ", head ", head));
  return pinned;
}

void BlockPages::prefetch(std::int64_t head, std::span<const Pick> picks) const {
  if (!check_head(head).ok()) return;
  for (const Pick& pick : picks)
    if (check_kept(pick.block, pick.block + 1).ok())
      store_->prefetch(segment_of(pick.block).page(pick.block % per_segment_, head));
}

std::int64_t BlockPages::resident_bytes() const {
  std::int64_t bytes = static_cast<std::int64_t>(sizeof *this) +
                       static_cast<std::int64_t>((segments_.capacity() + saved_.capacity()) *
                                                 sizeof(std::shared_ptr<Segment>));
  for (const auto& segment : segments_) bytes += segment->bytes();
  // What the saved state names and the stream has dropped or goes on filling.
  for (const auto& segment : saved_)
    if (std::ranges::find(segments_, segment) == segments_.end()) bytes += segment->bytes();
  return bytes;
}

std::int64_t BlockPages::kept_bound(std::int64_t max_blocks, std::int64_t blocks,
                                    std::int64_t between) {
  const std::int64_t segment = segment_blocks(max_blocks);
  std::int64_t most = blocks;
  if (max_blocks > 0) most = std::min(blocks, max_blocks + between + segment - 1);
  return (most + segment - 1) / segment * segment + (max_blocks > 0 ? segment : 0);
}

std::int64_t BlockPages::resident_bound(const PageShape& shape, std::int64_t max_blocks,
                                        std::int64_t blocks, std::int64_t between) {
  const std::int64_t segment = segment_blocks(max_blocks);
  // One segment more: the copy of the last one that a saved state keeps.
  const std::int64_t segments = kept_bound(max_blocks, blocks, between) / segment + 1;
  // Pointers: two lists, each at most doubled by growing.
  return static_cast<std::int64_t>(sizeof(BlockPages)) +
         segments * (Segment::bytes_of(shape, segment) +
                     4 * static_cast<std::int64_t>(sizeof(std::shared_ptr<Segment>)));
}

std::int64_t BlockPages::pages_bound(const PageShape& shape, std::int64_t max_blocks,
                                     std::int64_t blocks, std::int64_t between) {
  return shape.kv_heads * std::min(kept_bound(max_blocks, blocks, between), blocks);
}

}  // namespace everlong::landmark
