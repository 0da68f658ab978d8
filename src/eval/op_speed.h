// Times one operator of a mechanism on one case, after the case passed its correctness gate.
#pragma once
#include <nlohmann/json.hpp>
#include <string>

#include "mechanisms/mechanism.h"

namespace everlong {

struct OpBenchCase {
  std::string mechanism = "lightning";
  std::string kind;           // an operator of the mechanism; empty: its first one over sequences
  std::string form = "auto";  // "auto": the kernel of the device where there is one, else composite
  // "forward"; "train": forward and backward; "step": one token after `shape.tokens` tokens.
  std::string pass = "forward";
  // "composite", "naive", "sdpa" (torch's softmax attention, same shapes), "released"
  // (released_longnet.h), "short" (the timed form over as many tokens in sequences of
  // `short_tokens`, one after the other: 1 where a token's cost does not grow), "none".
  std::string baseline = "composite";
  std::int64_t short_tokens = 0;  // divides shape.tokens; only for "short"
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  OpShape shape;
};

// Measured in this process: what no pass can beat.
struct Ceilings {
  double flops = 0;  // of a large matrix product in the dtype, a second
  double bytes = 0;  // read and written by a large copy, a second
};
Ceilings measure_ceilings(at::Device device, at::ScalarType dtype);

struct OpBenchResult {
  bool passed = false;            // false: `record` holds "error" and no speeds
  nlohmann::ordered_json record;  // docs/benchmarks.md lists the fields
};
// Fails on wrong usage: unknown names, a shape that the operator refuses.
Result<OpBenchResult> bench_op(const OpBenchCase& wanted, const Ceilings& ceilings);

}  // namespace everlong
