// What a PagedMemory holds, in memory and in its file, and what it counted.
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "mechanisms/landmark/layer_pages.h"

namespace everlong::landmark {
namespace {

constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;  // sizes above stay within 64 bits

std::int64_t complete_blocks(std::int64_t tokens, const Retrieval& retrieval) {
  return std::clamp<std::int64_t>(tokens, 0, kMostTokens) / retrieval.block;
}

}  // namespace

std::int64_t PagedMemory::memory_bytes() const {
  std::int64_t bytes =
      store_->resident_bytes() + sequences() * static_cast<std::int64_t>(sizeof(std::int64_t));
  for (const auto& [name, tensor] : given_) bytes += static_cast<std::int64_t>(tensor.nbytes());
  for (const Line& line : lines_)
    bytes += line.pages.resident_bytes() + static_cast<std::int64_t>(line.k.nbytes()) +
             static_cast<std::int64_t>(line.v.nbytes()) + line.landmarks.bytes();
  return bytes + (pool_ ? pool_->bytes() : 0);
}

std::int64_t PagedMemory::bytes_bound(std::int64_t tokens) const {
  const Retrieval& r = shape_.retrieval;
  const PageShape& s = store_->shape();
  const std::int64_t blocks = complete_blocks(tokens, r), kept = kept_blocks(r);
  const std::int64_t a_row = s.kv_heads * (s.key_dim + s.value_dim) * s.element();
  const std::int64_t a_sequence = static_cast<std::int64_t>(sizeof(std::int64_t)) +
                                  BlockPages::resident_bound(s, kept, blocks) +
                                  (r.window + 1) * r.block * a_row;
  const std::int64_t host = PageStore::resident_bound(s, tiers_, most_pages(blocks));
  if (!pool_) return sequences() * a_sequence + host;
  // Copies go through a buffer of at most as many pages.
  const std::int64_t copies = pool_->slots() * s.page_bytes();
  return sequences() * (a_sequence + DeviceLandmarks::bytes_bound(s, kept, blocks)) + host +
         2 * copies;
}

std::int64_t PagedMemory::file_bytes_bound(std::int64_t tokens) const {
  if (!store_->has_file()) return 0;
  const std::int64_t blocks = complete_blocks(tokens, shape_.retrieval);
  return PageStore::file_bound(store_->shape(), most_pages(blocks));
}

std::int64_t PagedMemory::most_pages(std::int64_t blocks) const {
  const std::int64_t own =
      BlockPages::pages_bound(store_->shape(), kept_blocks(shape_.retrieval), blocks);
  return std::max(sequences() * own, store_->most_pages());
}

void PagedMemory::count(const Certificates& certificates) {
  if (!certificates.bound.defined() || !certify_) return;
  certain_.queries += static_cast<double>(certificates.bound.numel());
  certain_.within += certificates.bound.le(certify_->epsilon).sum().item<double>();
  certain_.unread_share += certificates.unread_share.sum().item<double>();
  certain_.more += certificates.more.sum().item<double>();
}

std::map<std::string, double> PagedMemory::counts() const {
  const StoreCounts of_store = store_->counts();
  std::map<std::string, double> counts = {{"page_hits", static_cast<double>(of_store.hits)},
                                          {"page_misses", static_cast<double>(of_store.misses)},
                                          {"pages_spilled", static_cast<double>(of_store.spilled)}};
  if (pool_)
    counts.merge(
        std::map<std::string, double>{{"device_hits", static_cast<double>(pool_->hits())},
                                      {"device_misses", static_cast<double>(pool_->misses())}});
  if (certify_)
    counts.merge(std::map<std::string, double>{{"queries", certain_.queries},
                                               {"queries_certified", certain_.within},
                                               {"unread_share", certain_.unread_share},
                                               {"blocks_more", certain_.more}});
  return counts;
}

}  // namespace everlong::landmark
