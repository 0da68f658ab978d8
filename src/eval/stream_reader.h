// A stream as a reader of retrieval prompts.
#pragma once
#include "eval/text_reader.h"
#include "session/stream.h"

namespace everlong {

// The stream outlives it; it places the landmarks of a model that has them.
class StreamReader : public TextReader {
 public:
  explicit StreamReader(Stream& stream) : stream_(stream) {}
  void reset() override { stream_.reset(); }
  Status feed(std::span<const std::int32_t> tokens) override { return stream_.feed(tokens); }
  // Lowest id on a tie, never a landmark. Refused where a logit is not a number.
  Result<std::int32_t> predict() override;
  std::int64_t state_bytes() const override { return stream_.state_bytes(); }

 private:
  Stream& stream_;
};

}  // namespace everlong
