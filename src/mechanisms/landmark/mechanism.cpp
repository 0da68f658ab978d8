#include "mechanisms/mechanism.h"

#include "mechanisms/landmark/layer.h"
#include "mechanisms/landmark/op.h"

namespace everlong::landmark {
namespace {

// Small blocks, so that a short text has a past to read; every call sees what a stream sees.
nlohmann::json example_settings(std::int64_t hidden_size) {
  const std::int64_t heads = hidden_size % 4 == 0 ? 4 : 1;
  return {{"num_heads", heads}, {"num_kv_heads", heads > 1 ? heads / 2 : 1},
          {"block", 8},         {"top_k", 2},
          {"window", 1},        {"training", "as_streamed"}};
}

Result<std::shared_ptr<Mixer>> make_layer(const LayerSpec& spec) {
  EVERLONG_ASSIGN(const LayerSettings settings, read_settings(spec));
  return std::shared_ptr<Mixer>(std::make_shared<LandmarkAttention>(settings));
}

}  // namespace

const Mechanism& mechanism() {
  static const Mechanism kMechanism = {
      .name = "landmark",
      .title = "Landmark Attention",
      .source = "arXiv 2305.16300",
      .carries = "all blocks of the past, found again through one landmark key each",
      .lacks = {{"bounded_state", "blocks are kept so that they can be read; set max_blocks"}},
      .operators = {&attention_operator(), &grouped_softmax_operator(), &retrieval_operator()},
      .running_settings = {"page_megabytes", "device_megabytes"},
      .register_schemas = register_schemas,
      .example_settings = example_settings,
      .make_layer = make_layer,
  };
  return kMechanism;
}

}  // namespace everlong::landmark
