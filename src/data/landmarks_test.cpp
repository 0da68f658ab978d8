#include "data/landmarks.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace everlong {
namespace {

using Ids = std::vector<std::int32_t>;

Ids inserted(std::int64_t tokens, std::int64_t block, std::int64_t piece, bool at_once) {
  Ids text(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<std::int32_t>(i);
  LandmarkInserter inserter(block, -7, at_once);
  Ids out;
  for (std::size_t at = 0; at < text.size(); at += static_cast<std::size_t>(piece))
    inserter.insert(
        std::span(text).subspan(at, std::min(static_cast<std::size_t>(piece), text.size() - at)),
        out);
  return out;
}

TEST(Landmarks, CloseEveryBlockHoweverTheTextIsCut) {
  for (const bool at_once : {false, true})
    for (const std::int64_t block : {2, 3, 16})
      for (std::int64_t tokens = 0; tokens < 50; ++tokens) {
        const Ids all = inserted(tokens, block, 1000, at_once);
        std::int32_t next = 0;
        for (std::size_t i = 0; i < all.size(); ++i) {
          const bool landmark = static_cast<std::int64_t>(i) % block == block - 1;
          EXPECT_EQ(all[i], landmark ? -7 : next++) << block << " at " << i;
        }
        EXPECT_EQ(next, tokens);
        const bool full = tokens > 0 && tokens % (block - 1) == 0;
        if (full) {
          EXPECT_EQ(all.back() == -7, at_once);
        }
        for (const std::int64_t piece : {1, 4, 15})
          EXPECT_EQ(inserted(tokens, block, piece, at_once), all);
      }
}

TEST(Landmarks, ResetBeginsABlock) {
  LandmarkInserter inserter(3, 9);
  Ids out;
  inserter.insert(Ids{1, 2, 3}, out);
  inserter.reset();
  inserter.insert(Ids{4, 5, 6}, out);
  EXPECT_EQ(out, (Ids{1, 2, 9, 3, 4, 5, 9, 6}));
}

}  // namespace
}  // namespace everlong
