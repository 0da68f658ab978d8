// Layers and models against their cases.
#pragma once
#include <optional>
#include <string>

#include "golden_case.h"
#include "golden_file.h"

namespace everlong::golden {

// An operator of the registry, in every form.
Verdict check_operator(const Case& wanted, const std::string& mechanism, const std::string& kind);

// Megalodon's operators, layers and model; also in the pieces of params "pieces", with what is
// carried after each.
Verdict check_megalodon(const Case& wanted, const std::string& level, const std::string& kind);

// Landmark Attention's block and models; nothing where the kind is none of those.
std::optional<Verdict> check_landmark(const Case& wanted, const std::string& kind,
                                      const fs::path& folder);

// LongNet's layers, in one pass and (causal ones) in pieces; nothing where the kind is neither.
std::optional<Verdict> check_longnet(const Case& wanted, const std::string& kind);

// One module with the weights w.*: in one pass without and with a state, and in pieces (params
// "split", else pieces of this program's choice).
Verdict check_layer(const Case& wanted, const std::string& mechanism, const std::string& kind);

// Token ids to logits, with the weights of the folder params.model_dir beside the file: in one
// pass, and as prefill and steps; out.greedy is the continuation by the likeliest token.
Verdict check_model(const Case& wanted, const std::string& mechanism, const std::string& kind,
                    const fs::path& folder);

}  // namespace everlong::golden
