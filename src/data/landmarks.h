// Landmark tokens in a text: one after every block - 1 tokens, so that they lie at positions
// block - 1 mod block (Landmark Attention, 2305.16300).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace everlong {

// Inserts as the text comes by, in any pieces. Not thread safe.
class LandmarkInserter {
 public:
  // block >= 2 tokens, its landmark counted. A landmark is due once its block is full. It comes
  // before the next token, so that the block's last token still says what comes next, or `at_once`
  // after the last one, for models in which the landmark says it.
  LandmarkInserter(std::int64_t block, std::int32_t landmark, bool at_once = false)
      : block_(block), landmark_(landmark), at_once_(at_once) {}

  // Appends `text` with the landmarks that it makes due.
  void insert(std::span<const std::int32_t> text, std::vector<std::int32_t>& out) {
    for (const std::int32_t token : text) {
      close_block(out);
      out.push_back(token);
      ++in_block_;
      if (at_once_) close_block(out);
    }
  }
  void reset() { in_block_ = 0; }

 private:
  void close_block(std::vector<std::int32_t>& out) {
    if (in_block_ < block_ - 1) return;
    out.push_back(landmark_);
    in_block_ = 0;
  }
  std::int64_t block_;
  std::int32_t landmark_;
  bool at_once_;
  std::int64_t in_block_ = 0;  // text tokens since the last landmark
};

// A document with what is asked after each of its tokens.
struct LabelledText {
  std::vector<std::int32_t> ids;      // the end of document last
  std::vector<std::int32_t> targets;  // kNoTarget (targets.h) where nothing is asked
  std::vector<float> weights;
  std::vector<float> writes = {};  // how often a memory stores each token; empty: once each
};

// The document with landmarks that are never predicted (section 4.1): they ask nothing, and the
// token before one asks what it asked without it.
LabelledText with_landmarks(const LabelledText& text, std::int64_t block, std::int32_t landmark);

}  // namespace everlong
