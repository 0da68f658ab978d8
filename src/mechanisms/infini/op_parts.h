// What the forms on tensors share: checks, rotation inside segments, the open segment.
#pragma once
#include "mechanisms/infini/op.h"
#include "ops/rope.h"

namespace everlong::infini {

// Throws where shapes, dtypes or devices do not fit.
void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                   const Options& options);

// Whether gradients stop where segment `number` takes its memory over.
bool is_cut(const Options& options, std::int64_t number);

// Weights of the open and the new tokens, [B, F + T]; undefined where all are one.
at::Tensor joined_weights(const at::Tensor& open, const at::Tensor& fresh, std::int64_t batch,
                          std::int64_t opened, std::int64_t tokens);

// What goes on after `closed` segments of these rows, but for M and z.
Carried carried_on(const Carried& before, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& weight, std::int64_t closed, const Options& options);

// Turns rows by their position in the segment.
class Turns {
 public:
  Turns(const Options& options, std::int64_t key_dim, std::int64_t rows, const at::Tensor& like);
  // x [B, t, H, K], its first row at position `first`.
  at::Tensor turn(const at::Tensor& x, std::int64_t first) const;

 private:
  RopeTable table_;  // undefined: no rotation
};

}  // namespace everlong::infini
