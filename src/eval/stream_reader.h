// A stream as a reader of retrieval prompts.
#pragma once
#include <optional>

#include "data/landmarks.h"
#include "eval/text_reader.h"
#include "session/stream.h"

namespace everlong {

// Feeds text; where the model's config names a landmark token, the landmarks are inserted here, one
// for each block of the landmark mechanism. The stream outlives it.
class StreamReader : public TextReader {
 public:
  explicit StreamReader(Stream& stream);
  void reset() override;
  Status feed(std::span<const std::int32_t> tokens) override;
  // Lowest id on a tie. Refused where a logit is not a number.
  Result<std::int32_t> predict() override;
  std::int64_t state_bytes() const override { return stream_.state_bytes(); }

 private:
  Stream& stream_;
  std::optional<LandmarkInserter> landmarks_;
  std::vector<std::int32_t> marked_;  // the text last fed, with landmarks
};

}  // namespace everlong
