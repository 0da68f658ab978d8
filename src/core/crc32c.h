// CRC-32C (Castagnoli, RFC 3720), the checksum of TensorBoard's records and of the log's lines.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace everlong {

namespace crc32c_detail {

constexpr std::array<std::uint32_t, 256> make_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0x82f63b78U : 0U);
    table[i] = value;
  }
  return table;
}
inline constexpr auto kTable = make_table();

}  // namespace crc32c_detail

// A byte at a time: for lines and records, not for weights.
constexpr std::uint32_t crc32c(std::string_view bytes) {
  std::uint32_t crc = 0xffffffff;
  for (const char byte : bytes)
    crc = (crc >> 8) ^
          crc32c_detail::kTable[(crc ^ static_cast<std::uint8_t>(byte)) & std::uint32_t{255}];
  return ~crc;
}

}  // namespace everlong
