#include "mechanisms/mechanism.h"

#include "mechanisms/infini/layer.h"
#include "mechanisms/infini/op.h"

namespace everlong::infini {
namespace {

nlohmann::json example_settings(std::int64_t hidden_size) {
  const std::int64_t heads = hidden_size % 8 == 0 ? 4 : 1;
  return {{"num_heads", heads},
          {"num_kv_heads", heads > 1 ? heads / 2 : 1},
          {"segment", 16},
          {"update", "delta"},
          {"rope", heads > 1 ? "half_split" : "none"}};
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  EVERLONG_ASSIGN(const LayerSettings settings, read_settings(spec));
  return std::shared_ptr<Mixer>(std::make_shared<InfiniAttention>(settings));
}

}  // namespace

const Mechanism& mechanism() {
  static const Mechanism kMechanism = {
      .name = "infini",
      .title = "Infini-attention",
      .source = "arXiv 2404.07143",
      .carries = "one matrix and one vector a key/value head, and the open segment",
      .lacks = {},
      .operators = {&attention_operator(), &memory_operator()},
      .register_schemas = register_schemas,
      .example_settings = example_settings,
      .make_layer = make_layer,
  };
  return kMechanism;
}

}  // namespace everlong::infini
