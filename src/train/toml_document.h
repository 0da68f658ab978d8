// A TOML document with overrides laid over it, which knows where each of its values came from.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong {

class TomlDocument {
 public:
  // An override reads "path.to.key=value"; the value is TOML, or else plain text. What is not TOML
  // is refused as "name:line: ...".
  static Result<TomlDocument> parse(std::string_view toml, const std::string& name,
                                    const std::vector<std::string>& overrides);

  // All values, tables as objects. Dates, which no setting is, become text.
  const nlohmann::json& root() const { return root_; }
  // Where the value of a dotted path stands: "run.toml:12", or the override that gave it, as in
  // "--set train.steps=500".
  std::string place(const std::string& path) const;

 private:
  explicit TomlDocument(std::string name) : name_(std::move(name)) {}
  Status lay_over(const std::string& text);

  std::string name_;
  nlohmann::json root_;
  std::map<std::string, std::string> places_;  // by dotted path
};

}  // namespace everlong
