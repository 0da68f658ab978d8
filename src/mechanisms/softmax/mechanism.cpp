#include "mechanisms/mechanism.h"

#include "mechanisms/softmax/layer.h"
#include "mechanisms/softmax/op.h"

namespace everlong::softmax {
namespace {

nlohmann::json example_settings(std::int64_t hidden_size) {
  const std::int64_t heads = hidden_size % 4 == 0 ? 4 : 1;
  return {{"num_heads", heads}, {"num_kv_heads", heads > 1 ? heads / 2 : 1}};
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  EVERLONG_ASSIGN(const LayerSettings settings, read_settings(spec));
  return std::shared_ptr<Mixer>(std::make_shared<Attention>(settings));
}

}  // namespace

const Mechanism& mechanism() {
  static const Mechanism kMechanism = {
      .name = "softmax",
      .title = "Softmax attention",
      .source =
          "arXiv 1706.03762 (attention), 2104.09864 (RoPE), 2305.13245 (GQA), 2310.06825 (window)",
      .carries = "keys and values of the past: all of them, or those inside the window",
      .lacks = {{"bounded_state", "the KV cache grows with the text; set window"}},
      .operators = {&attention_operator()},
      .register_schemas = register_schemas,
      .example_settings = example_settings,
      .make_layer = make_layer,
  };
  return kMechanism;
}

}  // namespace everlong::softmax
