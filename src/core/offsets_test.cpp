#include "core/offsets.h"

#include <gtest/gtest.h>

#include <vector>

namespace everlong {
namespace {

using Offsets = std::vector<std::int64_t>;

TEST(Offsets, EmptySequencesAndNoOffsetsAreLegal) {
  EXPECT_TRUE(check_offsets(Offsets{}, 3, 10).ok());
  EXPECT_TRUE(check_offsets(Offsets{0, 0, 4, 4, 10, 10}, 1, 10).ok());
  EXPECT_TRUE(check_offsets(Offsets{0, 0}, 1, 0).ok());
}

TEST(Offsets, WhatDoesNotTileTheLineIsRefused) {
  const auto message = [](const Offsets& offsets, std::int64_t batch) {
    return check_offsets(offsets, batch, 10).message();
  };
  EXPECT_NE(message({0, 10}, 2).find("batch 2"), std::string::npos);
  EXPECT_NE(message({0}, 1).find("1 entry"), std::string::npos);
  EXPECT_NE(message({1, 10}, 1).find("cu_seqlens[0] = 1"), std::string::npos);
  EXPECT_NE(message({0, 6, 5, 10}, 1).find("cu_seqlens[2] = 5 is below cu_seqlens[1] = 6"),
            std::string::npos);
  EXPECT_NE(message({0, 9}, 1).find("ends at 9"), std::string::npos);
  EXPECT_NE(message({0, 11}, 1).find("ends at 11"), std::string::npos);
}

}  // namespace
}  // namespace everlong
