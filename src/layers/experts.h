// A channel mixer made of many gated MLPs of which each token uses the few that a router picks.
// Source: Mixtral (2401.04088, section 2.1), as MiniMax-01 (2501.08313) uses it.
#pragma once
#include <memory>

#include "layers/gated_mlp.h"

namespace everlong {

// p = softmax over all experts of gate x, in fp32 (fp64 for fp64);  y = sum over the k largest p_e,
// divided by their sum, of p_e expert_e(x). Of equal p the lower expert comes first.
//
// Parameters gate.weight [E, D] and experts.<e>.{w1,w2,w3}.weight. Every expert runs once a call,
// on all its tokens together; an expert without tokens does not run, and its weights get no
// gradient. What a token gets does not depend on the tokens beside it (but for the rounding of a
// product of another size), and the order of every sum is fixed. No balancing loss is added. On
// CUDA a call waits for the router's choice.
Result<std::shared_ptr<GatedMlp>> make_experts(std::int64_t hidden_size,
                                               std::int64_t intermediate_size,
                                               std::int64_t num_experts,
                                               std::int64_t experts_per_token,
                                               std::int64_t num_layers);

}  // namespace everlong
