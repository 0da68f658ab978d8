#include "eval/plot.h"

#include <gtest/gtest.h>

#include <cmath>

namespace everlong {
namespace {

TEST(Plot, TicksAreRoundAndLieInside) {
  EXPECT_EQ(round_ticks(0, 1, 5), (std::vector<double>{0, 0.2, 0.4, 0.6000000000000001, 0.8, 1}));
  EXPECT_EQ(round_ticks(1.2, 5.7, 5), (std::vector<double>{2, 3, 4, 5}));
  EXPECT_EQ(round_ticks(0, 12000, 5), (std::vector<double>{0, 2500, 5000, 7500, 10000}));
}

TEST(Plot, TickTextHasTheDigitsThatTheStepNeeds) {
  EXPECT_EQ(tick_text(0, 0.5), "0");
  EXPECT_EQ(tick_text(1.5, 0.5), "1.5");
  EXPECT_EQ(tick_text(2, 0.25), "2.00");
  EXPECT_EQ(tick_text(10000, 0), "10K");
  EXPECT_EQ(tick_text(2500, 2500), "2.5K");
  EXPECT_EQ(tick_text(12500, 2500), "12.5K");
  EXPECT_EQ(tick_text(1000000, 0), "1M");
}

TEST(Plot, HoldsNamesEscapedAndNothingThatIsNoNumber) {
  const double nan = std::nan("");
  const Plot plot{
      .title = "a < b & \"c\"",
      .x_label = "x",
      .y_label = "y",
      .series = {{"first", {{0, 1}, {10, nan}, {100, 2}}}, {"<second>", {{1, 5}, {1000, 6}}, true}},
      .levels = {{"level", 3}},
      .log_x = true};
  const std::string text = svg(plot);
  EXPECT_NE(text.find("a &lt; b &amp; &quot;c&quot;"), std::string::npos);
  EXPECT_NE(text.find("&lt;second&gt;"), std::string::npos);
  EXPECT_EQ(text.find("nan"), std::string::npos) << text;
  EXPECT_EQ(text.find("inf"), std::string::npos) << text;
  EXPECT_TRUE(text.starts_with("<svg") && text.ends_with("</svg>"));
}

TEST(Plot, SaysSoWhenThereIsNothingToShow) {
  for (const bool log : {false, true}) {
    const std::string text = svg({.title = "empty", .series = {{"none", {}}}, .log_x = log});
    EXPECT_NE(text.find("nothing was measured"), std::string::npos);
    EXPECT_EQ(text.find("nan"), std::string::npos) << text;
  }
}

TEST(Plot, OnePointAndConstantValuesAreDrawn) {
  for (const bool bytes : {false, true}) {
    const std::string text =
        svg({.title = "flat", .series = {{"s", {{5, 7}}, true}}, .log_x = true, .bytes = bytes});
    EXPECT_EQ(text.find("nan"), std::string::npos) << text;
    EXPECT_EQ(text.find("inf"), std::string::npos) << text;
    EXPECT_NE(text.find("<circle"), std::string::npos);
  }
}

TEST(Plot, APictureStandsAlone) {
  const std::string file = svg_file("<svg viewBox=\"0 0 7 2\"><path class=\"c0\"/></svg>");
  EXPECT_TRUE(file.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"")) << file;
  EXPECT_NE(file.find("viewBox=\"0 0 7 2\"><style>"), std::string::npos);
  EXPECT_NE(file.find("--c0:"), std::string::npos);
  EXPECT_NE(file.find("</style><path class=\"c0\"/></svg>"), std::string::npos);
}

}  // namespace
}  // namespace everlong
