#include "core/settings.h"

#include <cmath>

namespace everlong {

Settings::Settings(const nlohmann::json& object, std::string place)
    : object_(object), place_(std::move(place)) {
  if (object_.is_null()) object_ = nlohmann::json::object();
  if (!object_.is_object()) {
    fail(invalid_argument("is ", object_.dump(), "; an object of settings is needed"));
    object_ = nlohmann::json::object();
  }
}

void Settings::fail(const Status& status) {
  if (first_error_.ok()) first_error_ = status.at(place_);
}

bool Settings::has(const std::string& key) const {
  return object_.contains(key) && !object_.at(key).is_null();
}

const nlohmann::json* Settings::find(const std::string& key) {
  known_.insert(key);
  return has(key) ? &object_.at(key) : nullptr;
}

nlohmann::json Settings::raw(const std::string& key) {
  const auto* value = find(key);
  return value != nullptr ? *value : nlohmann::json();
}

std::int64_t Settings::integer(const std::string& key, std::int64_t fallback, std::int64_t min,
                               std::int64_t max) {
  const auto* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_number_integer() ||
      (value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX)) {
    fail(invalid_argument(key, " = ", value->dump(), " is not a whole number; allowed: ", min,
                          " to ", max));
    return fallback;
  }
  const auto given = value->get<std::int64_t>();
  if (given >= min && given <= max) return given;
  fail(invalid_argument(key, " = ", given, " is out of range; allowed: ", min, " to ", max));
  return fallback;
}

double Settings::number(const std::string& key, double fallback, double min, double max) {
  const auto* value = find(key);
  if (value == nullptr) return fallback;
  const double given = value->is_number() ? value->get<double>() : std::nan("");
  if (given >= min && given <= max) return given;
  // JSON has no word for nan and inf, which TOML can say.
  fail(invalid_argument(key, " = ",
                        value->is_number_float() ? cat(value->get<double>()) : value->dump(),
                        " is not allowed; a number from ", min, " to ", max, " is needed"));
  return fallback;
}

bool Settings::boolean(const std::string& key, bool fallback) {
  const auto* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  fail(invalid_argument(key, " = ", value->dump(), " is not allowed; true or false is needed"));
  return fallback;
}

std::string Settings::text(const std::string& key, const std::string& fallback) {
  const auto* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  fail(invalid_argument(key, " = ", value->dump(), " is not allowed; a text is needed"));
  return fallback;
}

std::string Settings::choice(const std::string& key, const std::string& fallback,
                             const std::vector<std::string>& allowed) {
  const std::string given = text(key, fallback);
  for (const auto& name : allowed)
    if (name == given) return given;
  const std::string near = nearest(given, allowed);
  fail(invalid_argument(key, " = \"", given, "\" is not known; allowed: ", join(allowed, ", "),
                        near.empty() ? "" : cat(". Did you mean \"", near, "\"?")));
  return fallback;
}

Status Settings::finish() const {
  if (!first_error_.ok()) return first_error_;
  for (const auto& [key, value] : object_.items()) {
    if (known_.contains(key)) continue;
    const std::vector<std::string> known(known_.begin(), known_.end());
    const std::string near = nearest(key, known);
    return invalid_argument(key, " is not a setting; known: ", join(known, ", "),
                            near.empty() ? "" : cat(". Did you mean \"", near, "\"?"))
        .at(place_);
  }
  return {};
}

}  // namespace everlong
