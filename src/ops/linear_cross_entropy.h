// The head of a language model and its loss in one: logits = hidden weight^T, then cross-entropy, a
// few tokens at a time, so that the [tokens, vocabulary] logits of a long text never exist at once.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong {

inline constexpr std::int64_t kIgnoredTarget =
    -100;  // a token without a loss, as torch's cross_entropy has it

struct LinearCrossEntropy {
  at::Tensor nll_sum;  // scalar fp64: natural-log loss summed over the counted tokens, each times
                       // its weight. Differentiable once
  at::Tensor nll_N;    // per token, 0 where ignored; fp32 (fp64 for fp64 input). Not differentiable
};

// hidden [N, D] and weight [V, D] of one dtype (fp32, fp64, bf16, fp16), targets int64 [N] in [0,
// V) or kIgnoredTarget. N = 0 is legal: the sum is 0. `chunk` is the tokens per piece; 0 chooses it
// so that a piece holds about 4M logits (16 MB), on a GPU 64M (256 MB). Logits, softmax and the
// gradient of the weight are fp32 for low-precision input. The gradients are made in the same walk
// as the loss (grad mode on): dlogits = softmax - onehot, never stored. weights, where defined:
// fp32 [N], how much each token's loss counts in nll_sum (not differentiable).
LinearCrossEntropy linear_cross_entropy(const at::Tensor& hidden_ND, const at::Tensor& weight_VD,
                                        const at::Tensor& targets_N, std::int64_t chunk = 0,
                                        const at::Tensor& weights_N = {});

}  // namespace everlong
