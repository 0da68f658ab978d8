// Layers and models against their cases.
#pragma once
#include <string>

#include "golden_case.h"
#include "golden_file.h"

namespace everlong::golden {

// One module with the weights w.*: in one pass without and with a state, and in pieces (params
// "split", else pieces of this program's choice).
Verdict check_layer(const Case& wanted, const std::string& mechanism, const std::string& kind);

// Token ids to logits, with the weights of the folder params.model_dir beside the file: in one
// pass, and as prefill and steps; out.greedy is the continuation by the likeliest token.
Verdict check_model(const Case& wanted, const std::string& mechanism, const std::string& kind,
                    const fs::path& folder);

}  // namespace everlong::golden
