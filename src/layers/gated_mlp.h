// The channel mixers of the published blocks: one half gates the other, token by token;
// and the older one without a gate.
#pragma once
#include <torch/nn/module.h>

#include <memory>
#include <string>

#include "core/status.h"

namespace everlong {

class GatedMlp : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x) = 0;  // [.., hidden_size] -> the same shape
};

// "sglu" (TransNormerLLM): l3(l1(x) * l2(x)); parameters l1.weight, l2.weight, l3.weight.
// "swiglu" (Llama): down_proj(silu(gate_proj(x)) * up_proj(x)); parameters gate_proj, up_proj,
// down_proj (.weight).
// "gelu" (GPT-2): no gate, c_proj(gelu(c_fc(x))) with the exact GELU; c_fc, c_proj (.weight).
// "expert" (Mixtral, MiniMax-01): SwiGLU under the names w1 (gate), w3 (up) and w2 (down)
// (.weight). Other names are refused. The projection back is initialised for a residual stream of
// num_layers blocks.
Result<std::shared_ptr<GatedMlp>> make_gated_mlp(const std::string& name, std::int64_t hidden_size,
                                                 std::int64_t intermediate_size,
                                                 std::int64_t num_layers);

}  // namespace everlong
