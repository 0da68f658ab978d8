#include "core/json_lines.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "core/crc32c.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

constexpr const char* kKey = "crc32c";

std::string check_of(std::string_view body) {
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", static_cast<unsigned>(crc32c(body)));
  return digits;
}

// What ends a line whose members before are `body`: the comma and the brace belong to it.
std::string ending(std::string_view body) {
  return std::string(body == "{" ? "\"" : ",\"") + kKey + "\":\"" + check_of(body) + "\"}";
}

}  // namespace

std::string checked_json_line(const ordered_json& object) {
  std::string body = object.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  body.pop_back();  // the closing brace
  return body + ending(body) + "\n";
}

JsonLines parse_json_lines(std::string_view text) {
  struct Line {
    ordered_json object;  // discarded: not JSON
    bool checked;
  };
  std::vector<Line> all;
  bool any_checked = false;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty()) continue;
    auto& [object, checked] = all.emplace_back(
        Line{ordered_json::parse(line, nullptr, /*allow_exceptions=*/false), false});
    if (!object.is_object() || !object.contains(kKey)) continue;
    const std::size_t body = ending("{}").size();  // as long whatever it says
    checked = line.size() > body && line.ends_with(ending(line.substr(0, line.size() - body)));
    if (line == "{" + ending("{")) checked = true;
    any_checked = any_checked || checked;
    if (!checked) object = ordered_json(ordered_json::value_t::discarded);
    if (checked) object.erase(kKey);
  }
  JsonLines result;
  for (auto& [object, checked] : all) {
    if (object.is_object() && checked == any_checked)
      result.lines.push_back(std::move(object));
    else
      ++result.passed_over;
  }
  return result;
}

}  // namespace everlong
