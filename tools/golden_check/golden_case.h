// One everlong-golden-1 file against one operator.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/files.h"
#include "ops/operator.h"

namespace everlong::golden {

enum class Outcome { kPassed, kFailed, kNotApplicable, kNotGolden };

struct Verdict {
  Outcome outcome = Outcome::kFailed;
  std::string detail;  // the forms that ran and their largest error, or the tensor and form that
                       // failed, or the reason
};

struct Tally {
  std::int64_t passed = 0, failed = 0, not_applicable = 0;
};

// Every *.safetensors below a folder (or the file itself), sorted. A path that does not exist is
// refused.
Result<std::vector<fs::path>> find_files(const fs::path& root);

Verdict check(const fs::path& file);

}  // namespace everlong::golden
