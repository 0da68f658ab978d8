// What retrieval tasks ask of a model: to read, and to say what it holds to come next.
#pragma once
#include <cstdint>
#include <span>

#include "core/status.h"

namespace everlong {

// Not thread safe.
class TextReader {
 public:
  virtual ~TextReader() = default;
  virtual void reset() = 0;
  virtual Status feed(std::span<const std::int32_t> tokens) = 0;
  // The likeliest token after all that was fed since reset() (at least one token).
  virtual Result<std::int32_t> predict() = 0;
  virtual std::int64_t state_bytes() const = 0;  // what it carries now
};

}  // namespace everlong
