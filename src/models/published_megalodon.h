// Models of the published Megalodon code: its ModelConf, as JSON, and back.
#pragma once
#include "models/config.h"

namespace everlong {

// "megalodon": the members of ModelConf under their names there (model_dim, z_dim, value_dim,
// cema_ndim, ..); rope_base null is 10000 and output_size -1 the vocabulary. Dropout and settings
// of training and of its program's run time change no number of a forward pass and are not kept.
Result<ModelConfig> read_megalodon(const nlohmann::json& object, const std::string& place);
Result<nlohmann::json> write_megalodon(const ModelConfig& config);

}  // namespace everlong
