// JSON from outside, without the liberties of JSON parsers.
#pragma once
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/status.h"

namespace everlong {

// One JSON object. A parser takes a zero byte for the end of the text and keeps one of two members
// of the same name; both are refused here. Messages speak of "the `what`":
// parse_strict_object(text, "header").
Result<nlohmann::json> parse_strict_object(std::string_view text, std::string_view what);

// A list of whole numbers >= 0 that fit in int64.
bool is_list_of_counts(const nlohmann::json& value);

}  // namespace everlong
