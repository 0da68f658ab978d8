// What the layers of a model can bring from one position to another, by the arithmetic of their
// patterns and windows alone: nothing of the weights is looked at.
#pragma once
#include <vector>

#include "mechanisms/longnet/params.h"
#include "models/config.h"

namespace everlong {

class AttentionReach {
 public:
  // Of models whose layers are all causal longnet or softmax attention; others carry the past in
  // states that no lattice bounds, and are refused (kUnsupported).
  static Result<AttentionReach> of(const ModelConfig& config);

  // For each position of a text of so many tokens, through how many of the model's layers at least
  // what stands at `place` must pass to come there: 0 at `place` itself, -1 where it cannot. Any
  // head may carry it, and any position on the way. O(layers x patterns x heads x tokens).
  std::vector<std::int64_t> layers_from(std::int64_t place, std::int64_t tokens) const;

 private:
  struct Layer {
    bool lattice = false;
    longnet::Geometry geometry;
    std::int64_t kv_heads = 1;
    std::int64_t window = 0;  // of softmax attention; 0: all before
  };
  std::vector<Layer> layers_;
};

}  // namespace everlong
