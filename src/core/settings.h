// Reading a JSON object of settings with defaults, where every key must be known.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "core/status.h"

namespace everlong {

// Remembers the first thing wrong, so that a reader is a list of plain assignments followed by one
// check:
//   Settings s(object, "config.json: softmax");
//   heads = s.integer("num_heads", 8, 1, 65536);
//   EVERLONG_RETURN_IF_ERROR(s.finish());     // the first error, or the first key that nobody
//   asked for
class Settings {
 public:
  // `place` opens every message. Null counts as the empty object; anything but an object is an
  // error.
  Settings(const nlohmann::json& object, std::string place);

  std::int64_t integer(const std::string& key, std::int64_t fallback, std::int64_t min,
                       std::int64_t max);
  double number(const std::string& key, double fallback, double min, double max);
  bool boolean(const std::string& key, bool fallback);
  std::string text(const std::string& key, const std::string& fallback);
  std::string choice(const std::string& key, const std::string& fallback,
                     const std::vector<std::string>& allowed);
  // The raw member (null when absent), marked as known.
  nlohmann::json raw(const std::string& key);
  bool has(const std::string& key) const;

  void fail(const Status& status);
  Status finish() const;

 private:
  const nlohmann::json* find(const std::string& key);
  nlohmann::json object_;
  std::string place_;
  std::set<std::string> known_;
  Status first_error_;
};

}  // namespace everlong
