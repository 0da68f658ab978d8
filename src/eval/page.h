// What the pages of this program have in common.
#pragma once
#include <initializer_list>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace everlong {

// CSS beside plot_style(), once a page.
std::string_view page_style();
// "<tr><td>...": cells are escaped. tag: "td" or "th".
std::string table_row(std::initializer_list<std::string> cells, const char* tag = "td");
// A number of an object that may lack it: then NaN.
double number(const nlohmann::ordered_json& object, const char* key);

}  // namespace everlong
