// The decays of one layer, and the tables that the composite form multiplies with.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "core/status.h"

namespace everlong::lightning {

// Tables on one device in one dtype; n = chunk, R = group. Exponents are formed in float64 from
// integers, so lambda^-j never occurs and a slope of 80 underflows to the right zero. The scale is
// folded into what makes outputs.
struct DecayTables {
  std::int64_t chunk = 0;      // tokens of a full chunk
  at::Tensor mask_H1nn;        // scale exp(-s (i-j)) for i >= j, else 0
  at::Tensor from_start_H1n1;  // scale exp(-s (i+1)): how far token i has come from the state
                               // before the chunk
  at::Tensor to_end_H1n1;  // exp(-s (n-1-j)): how far token j lies from the state after the chunk
  at::Tensor
      between_HRR;  // exp(-s n (i-j-1)) for i > j, else 0: from after chunk j to before chunk i
  at::Tensor chunks_HR1;         // exp(-s n r): over r chunks, r < R
  at::Tensor lost_in_tokens_Hm;  // expm1(-s m), m = 0..n: what m tokens take away from a state
  at::Tensor lost_in_chunks_Hr;  // expm1(-s n r), r = 0..R
};

// Slopes (nats per token, one a head) and output scale of one layer. A cheap handle; tables are
// made on first use of a device and kept. Thread safe.
class Decay {
 public:
  Decay(std::vector<double> slope, double scale);

  const std::vector<double>& slope() const;
  double scale() const;
  // Tables for chunks of `chunk` tokens in groups of at most `group` chunks.
  const DecayTables& tables(const at::TensorOptions& options, std::int64_t chunk,
                            std::int64_t group) const;

 private:
  struct Content;
  std::shared_ptr<Content> content_;
};

}  // namespace everlong::lightning
