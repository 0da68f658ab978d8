#include "core/strict_json.h"

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace everlong {
namespace {

using nlohmann::json;

// A JSON object keeps one of two members of the same name; this remembers that there were two.
class DuplicateNames {
 public:
  bool operator()(int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) open_.emplace_back();
    if (event == json::parse_event_t::object_end) open_.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      if (!open_.back().insert(name).second && !found_) {
        found_ = true;
        name_ = name;
      }
    }
    return true;
  }
  bool found() const { return found_; }
  const std::string& name() const { return name_; }

 private:
  std::vector<std::set<std::string>> open_;
  bool found_ = false;
  std::string name_;
};

}  // namespace

Result<json> parse_strict_object(std::string_view text, std::string_view what) {
  if (text.find('\0') != std::string_view::npos)
    return corrupt("the ", what, " is not a valid JSON object: it holds a zero byte");
  DuplicateNames duplicates;
  json object =
      json::parse(text.begin(), text.end(), std::ref(duplicates), /*allow_exceptions=*/false);
  if (!object.is_object()) return corrupt("the ", what, " is not a valid JSON object");
  if (duplicates.found()) return corrupt("the ", what, " holds \"", duplicates.name(), "\" twice");
  return object;
}

bool is_list_of_counts(const json& value) {
  return value.is_array() && std::ranges::all_of(value, [](const json& item) {
           return item.is_number_unsigned() && item.get<std::uint64_t>() <= INT64_MAX;
         });
}

}  // namespace everlong
