// The files of a run folder, as reports read them. docs/formats.md, "Run folder".
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/files.h"
#include "eval/plot.h"

namespace everlong {

struct MeasuredRun {
  fs::path folder;
  std::vector<nlohmann::ordered_json> log;
  std::int64_t damaged_lines = 0;               // of the log, left out
  std::map<std::string, std::string> settings;  // of run.toml: "train.steps", and the value's text
  // Null where the file is not there.
  nlohmann::ordered_json config, train, baselines, perplexity, streaming, passkey, sample;
};
// Refuses what is no run folder, and files in it that are not what they should be.
Result<MeasuredRun> read_measured_run(const fs::path& folder);

// The member, or an empty text or list where there is none of that kind.
std::string word(const nlohmann::ordered_json& object, const char* key);
const nlohmann::ordered_json& list(const nlohmann::ordered_json& object, const char* key);
std::string whole(double value);  // rounded, with commas

// Bits per byte of the model on held-out text, NaN where nobody measured them: of the stream when
// it was scored, else of the perplexity run.
double model_bits(const MeasuredRun& run);
std::string layers_text(const nlohmann::ordered_json& config);  // "3 × lightning, 1 × softmax"

// The <figure> of a plot.
std::string figure(const Plot& plot, std::string_view caption);
// A self-contained page around the body.
std::string report_page(const std::string& title, const std::string& body);
// What to say of lines that are left out; empty where there are none.
std::string damaged_lines_text(const MeasuredRun& run);

}  // namespace everlong
