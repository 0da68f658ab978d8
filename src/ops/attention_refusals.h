// Wrong calls of operators over q, k and v, for law 8: those that all of them refuse, and a place
// for a room's own.
#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "ops/operator.h"

namespace everlong {

class AttentionRefusals {
 public:
  // `op` has inputs q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], takes cu_seqlens and a state.
  // The list begins with wrong shapes, dtypes, inputs and offsets, and a state of another batch.
  explicit AttentionRefusals(const Operator& op);

  using Change = std::function<void(OpCall&)>;
  void add(const char* name, const OpShape& shape, const Change& change);

  std::vector<std::pair<std::string, OpCall>> take() && { return std::move(list_); }

  const OpShape plain{.tokens = 6, .heads = 4, .kv_heads = 2};
  const OpShape two{.batch = 2, .tokens = 6};
  const OpShape packed{.tokens = 6, .cu_seqlens = {0, 2, 6}};
  const OpShape carried{.tokens = 6, .initial_state = true};

 private:
  const Operator& op_;
  std::vector<std::pair<std::string, OpCall>> list_;
};

}  // namespace everlong
