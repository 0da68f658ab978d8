#include "core/json_lines.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/crc32c.h"
#include "core/random.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

std::vector<ordered_json> some_lines() {
  std::vector<ordered_json> lines;
  for (int i = 1; i <= 20; ++i)
    lines.push_back({{"step", i}, {"loss", 5.5 / i}, {"note", i % 3 == 0 ? "a \"b\"" : ""}});
  return lines;
}

std::string text_of(const std::vector<ordered_json>& lines) {
  std::string text;
  for (const auto& line : lines) text += checked_json_line(line);
  return text;
}

// RFC 3720, B.4.
TEST(Crc32c, IsThatOfTheStandard) {
  static_assert(crc32c("123456789") == 0xe3069283);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aaU);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43U);
  EXPECT_EQ(crc32c(""), 0U);
}

TEST(JsonLines, ComeBackAsTheyWere) {
  const auto lines = some_lines();
  const auto read = parse_json_lines(text_of(lines));
  EXPECT_EQ(read.lines, lines);
  EXPECT_EQ(read.passed_over, 0);
  EXPECT_EQ(parse_json_lines(checked_json_line(ordered_json::object())).lines.size(), 1U);
}

TEST(JsonLines, WithoutChecksumsAreReadAsTheyAre) {
  const auto read = parse_json_lines("{\"step\":1}\n\n{\"step\":2}\nnot JSON\n{\"step\":3}");
  EXPECT_EQ(read.lines.size(), 3U);
  EXPECT_EQ(read.passed_over, 1);
}

TEST(JsonLines, LineWithoutChecksumAmongOthersIsPassedOver) {
  const auto read = parse_json_lines(text_of(some_lines()) + "{\"step\":21}\n");
  EXPECT_EQ(read.lines.size(), 20U);
  EXPECT_EQ(read.passed_over, 1);
}

// Whatever single byte changes and wherever the file is cut: only lines that were written come
// back, and at most two are lost to one byte (a newline that is gone joins two).
TEST(JsonLines, DamagedBytesNeverBecomeFigures) {
  const auto lines = some_lines();
  const std::string good = text_of(lines);
  const auto known = [&](const ordered_json& line) {
    return std::ranges::find(lines, line) != lines.end();
  };
  Random random{7};
  for (int i = 0; i < 2000; ++i) {
    std::string text = good;
    const auto at = static_cast<std::size_t>(random.below(static_cast<std::int64_t>(good.size())));
    const bool cut = i % 4 == 0;
    if (cut)
      text.resize(at);
    else
      text[at] = static_cast<char>(text[at] ^ static_cast<char>(random.between(1, 255)));
    const auto read = parse_json_lines(text);
    for (const auto& line : read.lines) ASSERT_TRUE(known(line)) << line.dump();
    ASSERT_GE(read.lines.size(), cut ? 0 : lines.size() - 2) << at;
  }
}

}  // namespace
}  // namespace everlong
