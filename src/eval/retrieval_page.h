// What `everlong eval passkey` and `needle` found, as a page that opens anywhere.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "eval/retrieval.h"

namespace everlong {

// HTML with inline SVG: no scripts, nothing beside it. `object` is to_json(report) and what the
// measurement says besides: model, settings, device, machine and commit.
std::string retrieval_page(const RetrievalReport& report, const nlohmann::ordered_json& object);
// The map of length and depth in such an object: the share of prompts answered exactly, or the same
// of its control, as SVG. Cells that an object from elsewhere lacks stay empty.
std::string retrieval_map(const nlohmann::ordered_json& object, bool control);

}  // namespace everlong
