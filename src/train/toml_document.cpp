#include "train/toml_document.h"

#define TOML_EXCEPTIONS 0
#include <toml++/toml.h>

#include <sstream>

#include "core/text.h"

namespace everlong {
namespace {

using nlohmann::json;
using Places = std::map<std::string, std::string>;

// The node as JSON; the place of everything inside a table is noted under its path.
json to_json(const toml::node& node, const std::string& path, const std::string& name,
             Places& places) {
  if (!path.empty()) places[path] = cat(name, ":", node.source().begin.line);
  if (const auto* table = node.as_table()) {
    json object = json::object();
    for (const auto& [key, value] : *table) {
      const std::string word(key.str());
      object[word] = to_json(value, path.empty() ? word : cat(path, ".", word), name, places);
    }
    return object;
  }
  if (const auto* array = node.as_array()) {
    Places inside;  // a list is one value
    json list = json::array();
    for (const auto& value : *array) list.push_back(to_json(value, "", name, inside));
    return list;
  }
  if (const auto* value = node.as_string()) return value->get();
  if (const auto* value = node.as_integer()) return value->get();
  if (const auto* value = node.as_floating_point()) return value->get();
  if (const auto* value = node.as_boolean()) return value->get();
  std::ostringstream date;
  node.visit([&](const auto& value) { date << value; });
  return std::move(date).str();
}

json parse_value(const std::string& text) {
  const auto parsed = toml::parse(cat("value = ", text, "\n"));
  Places unused;
  // More than one key: a value with a line break in it, which is plain text.
  if (!parsed || parsed.table().size() != 1) return text;
  return to_json(parsed.table(), "", "", unused).at("value");
}

}  // namespace

Result<TomlDocument> TomlDocument::parse(std::string_view toml, const std::string& name,
                                         const std::vector<std::string>& overrides) {
  const auto parsed = toml::parse(toml, name);
  if (!parsed)
    return invalid_argument(name, ":", parsed.error().source().begin.line,
                            ": is not TOML: ", parsed.error().description());
  TomlDocument document(name);
  document.root_ = to_json(parsed.table(), "", name, document.places_);
  for (const auto& text : overrides) EVERLONG_RETURN_IF_ERROR(document.lay_over(text));
  return document;
}

std::string TomlDocument::place(const std::string& path) const {
  const auto found = places_.find(path);
  return found == places_.end() ? name_ : found->second;
}

Status TomlDocument::lay_over(const std::string& text) {
  const auto bad = [&](const auto&... why) {
    return invalid_argument("--set ", text, ": ", why...);
  };
  const auto equals = text.find('=');
  const std::string path = text.substr(0, equals);
  if (equals == std::string::npos || path.find('.') == std::string::npos)
    return bad("section.key=value is needed, as in train.steps=500");
  json* table = &root_;
  std::size_t from = 0;
  for (auto dot = path.find('.'); dot != std::string::npos; dot = path.find('.', from)) {
    const std::string part = path.substr(from, dot - from);
    if (!table->contains(part)) {
      (*table)[part] = json::object();
      places_[path.substr(0, dot)] = cat("--set ", text);
    }
    table = &(*table)[part];
    if (!table->is_object()) return bad(part, " is a value, not a section");
    from = dot + 1;
  }
  (*table)[path.substr(from)] = parse_value(text.substr(equals + 1));
  places_[path] = cat("--set ", text);
  return {};
}

}  // namespace everlong
