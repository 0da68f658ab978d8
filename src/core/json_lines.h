// Logs of one JSON object a line, each line with its checksum: docs/formats.md, "Lines with
// checksums".
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace everlong {

// The object as one line, its checksum as the last member and a newline at the end.
std::string checked_json_line(const nlohmann::ordered_json& object);

struct JsonLines {
  std::vector<nlohmann::ordered_json> lines;  // without their checksums
  std::int64_t passed_over = 0;               // lines that are damaged
};
// Every line that is as it was written. Text of any bytes; thread safe.
JsonLines parse_json_lines(std::string_view text);

}  // namespace everlong
