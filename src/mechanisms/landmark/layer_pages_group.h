// Attention of one group of tokens over what is local and over what it takes from its past.
#pragma once
#include <limits>
#include <optional>

#include "mechanisms/landmark/layer_pages_past.h"

namespace everlong::landmark {

struct GroupRead {
  at::Tensor out, selected;  // [1, t, H, V] on q's device; int64 [1, t, H, P]
  // [1, t, H] on the CPU, where asked for: fp64 bound and share of what was left unread, int64
  // blocks read beyond the picks.
  at::Tensor bound, unread_share, more;
};

// From here on blocks are read until what is unread can change a head's output by at most epsilon.
struct Certify {
  double epsilon = 1e-3;
  std::int64_t at_most = std::numeric_limits<std::int64_t>::max();
};

// The last few tables of angles: positions are counted anew for each group, so groups of one length
// turn by the same ones. Not thread safe.
class TurnTables {
 public:
  // x [n, T, H, K] turned to T positions.
  at::Tensor turned(const at::Tensor& x_nTHK, const std::vector<std::int64_t>& positions,
                    const Reader& reader);

 private:
  struct Entry {
    std::vector<std::int64_t> positions;
    std::vector<double> frequencies;
    at::ScalarType dtype;
    at::Device device;
    RopeTable table;
  };
  static constexpr std::size_t kMost = 8;
  std::vector<Entry> entries_;
  std::size_t next_ = 0;  // to be replaced
};

// q [1, t, H, K] of the group, not turned. k, v [1, rows, G, D]: rows from the first local block
// on, the group's own last, keys turned to their place in the block. pages: certificates are
// computed from them, on the CPU, whatever `past` is.
GroupRead read_group(const at::Tensor& q_1tHK, const at::Tensor& k_1RGK, const at::Tensor& v_1RGV,
                     const Group& group, const Reader& reader, const BlockPages& pages,
                     const PastReader& past, const std::optional<Certify>& certify,
                     TurnTables& tables);

}  // namespace everlong::landmark
