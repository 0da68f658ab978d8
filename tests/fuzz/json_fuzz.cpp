// Any bytes as JSON and as a log of JSON lines with checksums.
#include <nlohmann/json.hpp>

#include "core/json_lines.h"
#include "core/strict_json.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto object = parse_strict_object(text, "object");
  if (fuzz::accepted(object)) fuzz::require(object->is_object(), "an object was asked for");
  const auto log = parse_json_lines(text);
  // What was read is written as it was.
  for (const auto& line : log.lines) {
    const auto again = parse_json_lines(checked_json_line(line));
    fuzz::require(again.passed_over == 0 && again.lines.size() == 1 && again.lines[0] == line,
                  "a line goes there and back");
  }
  return 0;
}
