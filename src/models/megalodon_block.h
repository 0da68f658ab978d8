// The block of Megalodon (2404.08801 section 3.4): the channel mixer's residual skips two hops,
//   y = x + GatedAttention(x)        x' = x + a FFN(LayerNorm(y))
// so y reaches the stream through the channel mixer alone. Norms are inside the two parts.
#pragma once
#include "models/decoder.h"

namespace everlong {

// Layers of other mechanisms are refused: they expect a norm in front.
Result<std::shared_ptr<Block>> make_megalodon_block(const ModelConfig& config, std::int64_t index);

}  // namespace everlong
