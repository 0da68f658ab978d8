#include "mechanisms/mechanism.h"

#include "mechanisms/megalodon/layer.h"
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {
namespace {

nlohmann::json example_settings(std::int64_t hidden_size) {
  return {{"num_heads", hidden_size % 8 == 0 ? 2 : 1},
          {"z_dim", 16},
          {"value_dim", 2 * hidden_size},
          {"cema_ndim", 4},
          {"norm_num_groups", hidden_size % 4 == 0 ? 4 : 1},
          {"chunk_size", 32}};
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  EVERLONG_ASSIGN(const LayerSettings settings, read_settings(spec));
  return std::shared_ptr<Mixer>(std::make_shared<GatedAttention>(settings));
}

}  // namespace

const Mechanism& mechanism() {
  static const Mechanism kMechanism = {
      .name = "megalodon",
      .title = "Megalodon",
      .source = "arXiv 2404.08801; where the published code differs, the code",
      .carries = "norm statistics, a complex moving average, keys and values of one chunk",
      .lacks = {},
      .operators = {&timestep_norm_operator(), &cema_operator(), &norm_cema_operator(),
                    &chunk_attention_operator()},
      .register_schemas = register_schemas,
      .example_settings = example_settings,
      .make_layer = make_layer,
  };
  return kMechanism;
}

}  // namespace everlong::megalodon
