// Building messages out of values, and parsing values out of text.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace everlong {

// Concatenates anything that streams: cat("slope[", 3, "] = ", -0.02).
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

std::string join(std::span<const std::string> parts, std::string_view separator);

// "Did you mean": the candidate nearest to `given` by edit distance, or "" when none is near.
std::string nearest(std::string_view given, std::span<const std::string> candidates);

// "1K" = 1024, "4k" = 4096, "1M" = 1048576, "2G"; plain numbers pass. Nothing on anything else.
std::optional<std::int64_t> parse_count(std::string_view text);
std::optional<double> parse_number(std::string_view text);

// 1234567 -> "1,234,567"; 1536 -> "1.5 KiB"; 75.2 -> "1m15s".
std::string with_commas(std::int64_t value);
std::string human_bytes(double bytes);
std::string human_duration(double seconds);
// Fixed digits after the point, as printf "%.*f".
std::string fixed(double value, int digits);

}  // namespace everlong
