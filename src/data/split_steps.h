// How a tokenizer cuts text into the pieces that byte pairs are merged in.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "data/pattern.h"

namespace everlong {

// What becomes of the matches of a pattern; names as in tokenizer.json.
enum class SplitBehavior { kIsolated, kRemoved, kContiguous, kMergedWithPrevious, kMergedWithNext };

struct SplitStep {
  Pattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // the pattern describes the pieces, not what is between them
};

// The `pre_tokenizer` member of tokenizer.json. Immutable and thread safe.
class SplitSteps {
 public:
  // kUnsupported for steps that would not end in bytes as ByteLevel makes them.
  static Result<SplitSteps> read(const nlohmann::json& pre_tokenizer);

  // The pieces of `text` in order, as views into it or, where a space was put in front, into
  // `storage`, which must outlive them.
  void cut(std::string_view text, std::vector<std::string>& storage,
           std::vector<std::string_view>& pieces) const;

 private:
  Status add(const nlohmann::json& step);
  std::vector<SplitStep> steps_;
  std::vector<SplitStep> last_;  // of ByteLevel, after its space: none or one
  bool space_in_front_ = false, byte_level_ = false;
};

}  // namespace everlong
