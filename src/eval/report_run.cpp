#include "eval/report_run.h"

#include <cmath>
#include <sstream>

#include "core/json_lines.h"
#include "core/text.h"
#include "eval/page.h"
#include "eval/report.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t kMostLogBytes = std::size_t{1} << 30;

// Null when the file is not there: a report shows what there is.
Result<ordered_json> read_optional(const fs::path& path) {
  const auto text = read_file(path);
  if (text.status().code() == StatusCode::kNotFound) return ordered_json();
  if (!text.ok()) return text.status();
  auto value = ordered_json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return corrupt(path.string(), ": is not JSON; make it again");
  return value;
}

// The same for a file of one line that carries its checksum.
Result<ordered_json> read_optional_line(const fs::path& path) {
  const auto text = read_file(path);
  if (text.status().code() == StatusCode::kNotFound) return ordered_json();
  if (!text.ok()) return text.status();
  const auto read = parse_json_lines(*text);
  if (read.passed_over > 0 || read.lines.size() != 1)
    return corrupt(path.string(),
                   ": is damaged; everlong train RUN --resume of the finished run writes it again");
  return read.lines.front();
}

// run.toml as training writes it: a section, or "key = value", a line.
std::map<std::string, std::string> read_settings(const fs::path& path) {
  std::map<std::string, std::string> settings;
  const auto text = read_file(path);
  if (!text.ok()) return settings;
  std::istringstream lines(*text);
  std::string section;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('[') && line.ends_with(']')) section = line.substr(1, line.size() - 2);
    const auto equals = line.find(" = ");
    if (equals != line.npos && !line.starts_with('['))
      settings[cat(section, ".", line.substr(0, equals))] = line.substr(equals + 3);
  }
  return settings;
}

}  // namespace

Result<MeasuredRun> read_measured_run(const fs::path& folder) {
  MeasuredRun run;
  run.folder = folder;
  const auto log = read_file(folder / kLogFile, kMostLogBytes);
  if (!log.ok())
    return log.status().at(cat(folder.string(),
                               ": no training log, so this is not a run folder; make one with: "
                               "everlong train RUN.toml --out ",
                               folder.string()));
  auto lines = parse_json_lines(*log);
  run.log = std::move(lines.lines);
  run.damaged_lines = lines.passed_over;
  run.settings = read_settings(folder / "run.toml");
  EVERLONG_ASSIGN(run.config, read_optional(folder / "model" / "config.json"));
  EVERLONG_ASSIGN(run.train, read_optional_line(folder / kTrainFile));
  EVERLONG_ASSIGN(run.baselines, read_optional(folder / kBaselinesFile));
  EVERLONG_ASSIGN(run.perplexity, read_optional(folder / kPerplexityFile));
  EVERLONG_ASSIGN(run.streaming, read_optional(folder / kStreamingFile));
  EVERLONG_ASSIGN(run.passkey, read_optional(folder / kPasskeyFile));
  EVERLONG_ASSIGN(run.sample, read_optional(folder / kSampleFile));
  return run;
}

std::string word(const ordered_json& object, const char* key) {
  return object.is_object() && object.contains(key) && object.at(key).is_string()
             ? object.at(key).get<std::string>()
             : "";
}

const ordered_json& list(const ordered_json& object, const char* key) {
  static const ordered_json kEmpty = ordered_json::array();
  return object.is_object() && object.contains(key) && object.at(key).is_array() ? object.at(key)
                                                                                 : kEmpty;
}

std::string whole(double value) {
  return with_commas(static_cast<std::int64_t>(std::llround(value)));
}

double model_bits(const MeasuredRun& run) {
  const double streamed = number(run.streaming, "bits_per_byte");
  return std::isfinite(streamed) ? streamed : number(run.perplexity, "bits_per_byte");
}

std::string layers_text(const ordered_json& config) {
  std::vector<std::pair<std::string, int>> runs;
  for (const auto& layer : list(config, "layer_types")) {
    const std::string name = layer.is_string() ? layer.get<std::string>() : "?";
    if (runs.empty() || runs.back().first != name) runs.emplace_back(name, 0);
    ++runs.back().second;
  }
  std::string out;
  for (const auto& [name, count] : runs) out += cat(out.empty() ? "" : ", ", count, " × ", name);
  return out;
}

std::string figure(const Plot& plot, std::string_view caption) {
  return cat("<figure>", svg(plot), "<figcaption>", caption, "</figcaption></figure>\n");
}

std::string report_page(const std::string& title, const std::string& body) {
  return cat(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\">\n<title>",
      html_escape(title), "</title>\n<style>", plot_style(), page_style(),
      "</style></head>\n<body>\n<h1>", html_escape(title), "</h1>\n", body, "</body></html>\n");
}

std::string damaged_lines_text(const MeasuredRun& run) {
  if (run.damaged_lines == 0) return "";
  return cat("<p>", html_escape((run.folder / kLogFile).string()), ": ",
             with_commas(run.damaged_lines), " damaged lines are left out.</p>\n");
}

}  // namespace everlong
