// What a memory holds, in the numbers that decide whether it can give something back. Source: the
// slot form (README.md section 2): slot i holds the mean value M_i / z_i of all that was written to
// it, z_i says how much that was.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace everlong::infini {

// Of one key/value head. Each token adds sigma(k)_i > 0 to z_i, so no slot is ever closed: what a
// token leaves in slot i is sigma(k)_i / z_i of its mean.
struct SlotMass {
  double mean = 0, smallest = 0, largest = 0;  // of z over the K slots
  // largest / smallest: how much more the loudest slot took than the quietest; 1 while empty.
  double contrast() const { return smallest > 0 ? largest / smallest : 1; }
  // The weight that one token with sigma(k)_i = 1 has, or would have, in the quietest slot.
  double best_share() const { return 1 / (1 + smallest); }
};

// z [G, K] of one sequence, any floating dtype and device -> one for each head.
std::vector<SlotMass> slot_masses(const at::Tensor& z_GK);

}  // namespace everlong::infini
