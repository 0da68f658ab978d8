// A training run and what was measured on its model, as one page that opens anywhere.
#pragma once
#include <string>
#include <vector>

#include "core/files.h"

namespace everlong {

// Files of a run folder that the report reads; each may be missing, log.jsonl excepted.
// docs/formats.md.
inline constexpr const char* kLogFile = "log.jsonl";             // written by training
inline constexpr const char* kTrainFile = "train.json";          // written by training
inline constexpr const char* kBaselinesFile = "baselines.json";  // everlong eval baselines --save
inline constexpr const char* kPerplexityFile =
    "perplexity.json";                                           // everlong eval perplexity --save
inline constexpr const char* kStreamingFile = "streaming.json";  // everlong stream --save
inline constexpr const char* kPasskeyFile = "passkey.json";      // everlong eval passkey --save
inline constexpr const char* kSampleFile = "sample.json";        // everlong generate --save

// HTML with inline SVG: no scripts, no links to elsewhere, light and dark.
Result<std::string> render_report(const fs::path& run_folder);
// Several runs side by side: figures, curves over the steps, the settings that differ.
Result<std::string> render_comparison(const std::vector<fs::path>& run_folders);

}  // namespace everlong
