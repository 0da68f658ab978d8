// What queries of a stream in tiers take from its past: which blocks they pick, and their attention
// within each. On the CPU from pages where they lie in memory; layer_pages_device.h has the other.
#pragma once
#include <ATen/core/Tensor.h>

#include "mechanisms/landmark/kernel_pages_read.h"
#include "mechanisms/landmark/op_blocks.h"

namespace everlong::landmark {

// Tokens of one sequence that share a frame. Legend: G key heads, R query heads of each, t tokens,
// n = t R queries of a key head, P = frame.picks, at least 1.
struct PastQueries {
  Frame frame;
  at::Tensor places_GSnK;  // fp32, contiguous, S = P + 1: queries as PageQueries has them
  at::Tensor near_Gn;      // fp32: log of the sum over what is local
  std::int64_t tokens = 0;
  double scale = 1;
  Granularity granularity = Granularity::kTokenHead;
};

// On the queries' device.
struct PastRead {
  at::Tensor out_GnPV;      // fp32: attention within each picked block
  at::Tensor gates_GnP;     // fp32: the block's score where it is read
  at::Tensor selected_GnP;  // int64, rising
};

// deciding and own scores [G, n, count] of the blocks from frame.oldest on: what picks compares is
// `scores` itself, or what tokens or heads say together.
at::Tensor deciding_scores(const at::Tensor& scores_Gnc, const PastQueries& queries);

class PastReader {
 public:
  virtual ~PastReader() = default;
  // Throws what the store says: kNotFound and kCorrupt for lost and damaged pages.
  virtual PastRead read(const PastQueries& queries) const = 0;
};

// The queries are on the CPU.
class HostPast final : public PastReader {
 public:
  explicit HostPast(const BlockPages& pages) : pages_(pages) {}
  PastRead read(const PastQueries& queries) const override;

 private:
  using Picks = std::vector<std::vector<Pick>>;  // of each query of a head
  std::vector<Picks> pick(const PastQueries& queries) const;
  at::Tensor all_scores(const PastQueries& queries) const;

  const BlockPages& pages_;
};

// The queries of head g as the pages take them; places must outlive it.
PageQueries page_queries(const PastQueries& queries, std::int64_t g);

}  // namespace everlong::landmark
