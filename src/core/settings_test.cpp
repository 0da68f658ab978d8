#include "core/settings.h"

#include <gtest/gtest.h>

namespace everlong {
namespace {

using nlohmann::json;

TEST(Settings, GivenValuesWinOverDefaults) {
  Settings s(json::parse(R"({"heads": 4, "scale": 0.5, "bias": true, "name": "x"})"), "here");
  EXPECT_EQ(s.integer("heads", 8, 1, 64), 4);
  EXPECT_EQ(s.integer("layers", 8, 1, 64), 8);
  EXPECT_EQ(s.number("scale", 1, 0, 1), 0.5);
  EXPECT_TRUE(s.boolean("bias", false));
  EXPECT_EQ(s.text("name", ""), "x");
  EXPECT_TRUE(s.finish().ok());
}

TEST(Settings, AnUnknownKeyIsRefusedWithAGuess) {
  Settings s(json::parse(R"({"heds": 4})"), "config.json: softmax");
  (void)s.integer("heads", 8, 1, 64);
  const Status status = s.finish();
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.message(),
            "config.json: softmax: heds is not a setting; known: heads. Did you mean \"heads\"?");
}

TEST(Settings, WrongTypesAndRangesAreRefused) {
  for (const char* text : {R"({"n": "4"})", R"({"n": 4.5})", R"({"n": 0})", R"({"n": 65})",
                           R"({"n": 18446744073709551615})", R"({"n": [4]})"}) {
    Settings s(json::parse(text), "here");
    (void)s.integer("n", 8, 1, 64);
    EXPECT_FALSE(s.finish().ok()) << text;
  }
  Settings number(json::parse(R"({"x": "nan"})"), "here");
  (void)number.number("x", 1, 0, 1);
  EXPECT_FALSE(number.finish().ok());
  Settings choice(json::parse(R"({"rule": "alibbi"})"), "here");
  (void)choice.choice("rule", "alibi", {"alibi", "paper"});
  EXPECT_NE(choice.finish().message().find("Did you mean \"alibi\"?"), std::string::npos);
  EXPECT_FALSE(Settings(json::parse("[1]"), "here").finish().ok());
  EXPECT_TRUE(Settings(json(), "here").finish().ok());
}

TEST(Settings, TheFirstErrorIsTheOneToldOf) {
  Settings s(json::parse(R"({"a": 0, "b": 0})"), "here");
  (void)s.integer("a", 1, 1, 2);
  (void)s.integer("b", 1, 1, 2);
  EXPECT_NE(s.finish().message().find("a = 0"), std::string::npos);
}

}  // namespace
}  // namespace everlong
