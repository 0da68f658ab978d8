#include "core/text.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

TEST(Text, CountsTakeBinarySuffixesAndNothingElse) {
  EXPECT_EQ(parse_count("1K"), 1024);
  EXPECT_EQ(parse_count("16k"), 16384);
  EXPECT_EQ(parse_count("1M"), 1048576);
  EXPECT_EQ(parse_count("2G"), std::int64_t{1} << 31);
  EXPECT_EQ(parse_count("1000000"), 1000000);
  EXPECT_EQ(parse_count("-3"), -3);
  for (const char* bad :
       {"", "K", "1.5K", "1KB", " 1", "1 ", "0x10", "99999999999999999999", "9223372036854775807G"})
    EXPECT_FALSE(parse_count(bad).has_value()) << bad;
}

TEST(Text, NumbersAreReadWhole) {
  EXPECT_EQ(parse_number("1e-3"), 1e-3);
  EXPECT_FALSE(parse_number("1e-3x").has_value());
  EXPECT_FALSE(parse_number("").has_value());
}

TEST(Text, NearestGuessesTyposAndStaysSilentOnStrangers) {
  const std::vector<std::string> names = {"lightning", "softmax", "megalodon"};
  EXPECT_EQ(nearest("lighting", names), "lightning");
  EXPECT_EQ(nearest("sofmax", names), "softmax");
  EXPECT_EQ(nearest("bidirectional", names), "");
  const std::vector<std::string> short_names = {"train", "stream", "data"};
  EXPECT_EQ(nearest("trian", short_names), "train") << "two letters exchanged are one slip";
  EXPECT_EQ(nearest("trifle", short_names), "");
}

TEST(Text, HumanFormsReadAsPeopleWriteThem) {
  EXPECT_EQ(with_commas(0), "0");
  EXPECT_EQ(with_commas(999), "999");
  EXPECT_EQ(with_commas(1234567), "1,234,567");
  EXPECT_EQ(with_commas(-1234), "-1,234");
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(3.0 * (1 << 30)), "3.0 GiB");
  EXPECT_EQ(human_duration(3.25), "3.2s");
  EXPECT_EQ(human_duration(75), "1m15s");
  EXPECT_EQ(human_duration(7260), "2h1m");
}

}  // namespace
}  // namespace everlong
