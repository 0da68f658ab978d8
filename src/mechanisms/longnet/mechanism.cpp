#include "mechanisms/mechanism.h"

#include "mechanisms/longnet/layer.h"
#include "mechanisms/longnet/op.h"

namespace everlong::longnet {
namespace {

nlohmann::json example_settings(std::int64_t hidden_size) {
  const std::int64_t heads = hidden_size % 4 == 0 ? 4 : 1;
  return {{"num_heads", heads},
          {"num_kv_heads", heads > 1 ? heads / 2 : 1},
          {"segment_length", {16, 32, 64}},
          {"dilated_ratio", {1, 2, 4}}};
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  EVERLONG_ASSIGN(const LayerSettings settings, read_settings(spec));
  return std::shared_ptr<Mixer>(std::make_shared<DilatedSelfAttention>(settings));
}

}  // namespace

const Mechanism& mechanism() {
  static const Mechanism kMechanism = {
      .name = "longnet",
      .title = "LongNet dilated attention",
      .source = "arXiv 2307.02486 (dilated attention), 2210.06423 (sub-LN), 2212.10554 (XPos)",
      .carries = "per pattern the lattice rows of the segment in progress: ceil(w / r) a head",
      .lacks = {},
      .operators = {&attention_operator(), &decode_operator()},
      .register_schemas = register_schemas,
      .example_settings = example_settings,
      .make_layer = make_layer,
  };
  return kMechanism;
}

}  // namespace everlong::longnet
