// Decayed linear attention in float64, straight from the equations (README.md sections 1 to 3): the
// oracle of the room. Shares no code with any kernel and none between its forms beyond the loop
// over sequences and heads. Torch-free.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "mechanisms/lightning/params.h"

namespace everlong::lightning::reference {

// C order. Views are not owned.
struct Input {
  Shape shape;
  std::span<const double> q_BTHK, k_BTHK, v_BTHV;
  std::span<const double> slope_H;
  double scale = 1.0;
  std::span<const double> state_NHKV;  // empty: zero
};
struct Output {
  std::vector<double> o_BTHV, state_NHKV;
};
// Gradients of <o, grad_o> + <final state, grad_state>.
struct Gradient {
  std::vector<double> q_BTHK, k_BTHK, v_BTHV, state_NHKV;
};

// Every function refuses what validate() refuses and spans whose sizes do not fit the shape. An
// empty grad span is a zero gradient. chunk >= 1; a sequence's last chunk has the length that is
// left, and decays by that.

Result<Output> parallel(const Input& in);  // quadratic in the length of a sequence
Result<Output> chunked(
    const Input& in,
    std::int64_t chunk);  // 2401.04658 section 3.2, without the lambda S convention
Result<Output> recurrent(const Input& in);  // one token at a time

Result<Gradient> parallel_gradient(const Input& in, std::span<const double> grad_o,
                                   std::span<const double> grad_state);
Result<Gradient> chunked_gradient(const Input& in, std::int64_t chunk,
                                  std::span<const double> grad_o,
                                  std::span<const double> grad_state);
Result<Gradient> recurrent_gradient(const Input& in, std::span<const double> grad_o,
                                    std::span<const double> grad_state);

}  // namespace everlong::lightning::reference
