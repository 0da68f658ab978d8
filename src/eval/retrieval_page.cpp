#include "eval/retrieval_page.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/text.h"
#include "eval/heat_map.h"
#include "eval/page.h"
#include "eval/plot.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

std::vector<double> numbers(const ordered_json& object, const char* key) {
  std::vector<double> out;
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array()) return out;
  for (const auto& value : *found)
    if (value.is_number()) out.push_back(value.get<double>());
  return out;
}

// No trials where the object has none, or counts that cannot be.
Proportion proportion(const ordered_json& score, const char* key) {
  const auto found = score.is_object() ? score.find(key) : score.end();
  if (found == score.end()) return {};
  const double successes = number(*found, "successes"), trials = number(*found, "trials");
  if (!(successes >= 0 && trials >= successes && trials < 0x1p53)) return {};
  return {static_cast<std::int64_t>(successes), static_cast<std::int64_t>(trials)};
}

// 32768 -> "32K", 1000 -> "1,000".
std::string length_name(std::int64_t tokens) {
  constexpr std::int64_t kMega = 1 << 20;
  if (tokens >= kMega && tokens % kMega == 0) return cat(tokens / kMega, "M");
  return tokens >= 1024 && tokens % 1024 == 0 ? cat(tokens / 1024, "K") : with_commas(tokens);
}

std::string share_text(const Proportion& proportion) {
  return cat(percent(proportion.share()), " % (", proportion.successes, "/", proportion.trials,
             ", 95 % interval ", percent(proportion.low()), "-", percent(proportion.high()), ")");
}

// "97.9 % (47/48), 89.1-99.6"
std::string short_share(const Proportion& proportion) {
  return cat(percent(proportion.share()), " % (", proportion.successes, "/", proportion.trials,
             "), ", percent(proportion.low()), "-", percent(proportion.high()));
}

std::string cell_table(const RetrievalReport& report) {
  std::string out = cat("<table>", table_row({"length", "depth", "exact", "answer tokens",
                                              "fact to end", "without memory", "state"},
                                             "th"));
  for (const auto& cell : report.cells)
    out += table_row({with_commas(cell.length), cat(fixed(100 * cell.depth, 0), " %"),
                      short_share(cell.score.exact), short_share(cell.score.tokens),
                      cat(with_commas(cell.nearest), "-", with_commas(cell.farthest)),
                      report.options.control ? short_share(cell.control.exact) : "",
                      human_bytes(static_cast<double>(cell.state_bytes))});
  return out + "</table>\n";
}

std::string facts(const RetrievalReport& report, const ordered_json& object) {
  std::string out = "<h2>What was measured</h2>\n<table class=\"facts\">";
  const auto add = [&](const std::string& name, const std::string& value) {
    if (!value.empty()) out += table_row({name, value});
  };
  const auto& options = report.options;
  const auto said = [&](const char* key) {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null() || found->empty()) return std::string();
    return found->is_string() ? found->get<std::string>() : found->dump();
  };
  add("model", said("model"));
  add("settings changed", said("settings"));
  add("task",
      object.contains("task") ? object.at("task").dump() : std::string(name(report.task.kind)));
  add("filler", std::string(name(report.filler)));
  add("prompts a cell", cat(options.prompts, ", seed ", options.seed));
  add("jitter of the fact", cat(options.jitter, " tokens either way"));
  if (options.length_jitter > 0)
    add("jitter of the length", cat("up to ", options.length_jitter, " tokens shorter"));
  if (options.local > 0)
    add("within reach of attention alone", cat("the last ", with_commas(options.local), " tokens"));
  add("tokens read", cat(with_commas(report.tokens), " in ", human_duration(report.seconds)));
  add("device", cat(said("device"), " ", said("dtype")));
  add("machine", said("machine"));
  add("commit", said("commit"));
  return out + "</table>\n";
}

// Wider than a report: maps and a table of every cell.
constexpr const char* kWider = R"(
body { max-width: 860px; }
table { font-size: 13px; }
th, td { white-space: nowrap; }
.facts td { white-space: normal; }
)";

}  // namespace

std::string retrieval_map(const nlohmann::ordered_json& object, bool control) {
  HeatMap map{.title = control ? "Without memory: prompts answered exactly, %"
                               : "Prompts answered exactly, %",
              .x_label = "tokens of the prompt",
              .y_label = "depth of the fact"};
  std::vector<double> lengths = numbers(object, "lengths"), depths = numbers(object, "depths");
  for (const auto length : lengths)
    map.columns.push_back(length_name(static_cast<std::int64_t>(length)));
  for (const auto depth : depths) map.rows.push_back(cat(fixed(100 * depth, 0), " %"));
  map.cells.resize(map.rows.size());
  for (auto& line : map.cells) line.resize(map.columns.size());
  const auto cells = object.find("cells");
  if (cells == object.end() || !cells->is_array()) return svg(map);
  for (const auto& cell : *cells) {
    if (!cell.is_object()) continue;
    const auto score = control ? cell.value("control", ordered_json::object()) : cell;
    const auto exact = proportion(score, "exact"), tokens = proportion(score, "tokens");
    const auto column = std::ranges::find(lengths, number(cell, "length")) - lengths.begin();
    const auto row = std::ranges::find(depths, number(cell, "depth")) - depths.begin();
    if (exact.trials == 0 || column == std::ssize(lengths) || row == std::ssize(depths)) continue;
    map.cells[static_cast<std::size_t>(row)][static_cast<std::size_t>(column)] =
        HeatMap::Cell{exact.share(), percent(exact.share()),
                      cat("exact ", share_text(exact), "; tokens ", share_text(tokens))};
  }
  return svg(map);
}

std::string retrieval_page(const RetrievalReport& report, const nlohmann::ordered_json& object) {
  const std::string title = cat("Everlong: ", name(report.task.kind));
  const auto total = report.total();
  const auto figure = [&](bool control, std::string_view caption) {
    return cat("<figure>", retrieval_map(object, control), "<figcaption>", caption,
               "</figcaption></figure>\n");
  };
  return cat(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\">\n<title>",
      title, "</title>\n<style>", plot_style(), page_style(), kWider,
      "</style></head>\n<body>\n<h1>", title, "</h1>\n<p>",
      html_escape(cat("All cells: exact ", share_text(total.exact), "; answer tokens ",
                      share_text(total.tokens))),
      "</p>\n",
      figure(false,
             "Depth 0 is right after the opening words, 100 % right before the question. Facts "
             "near the end may be read by attention alone and then say nothing about memory."),
      report.options.control
          ? figure(true,
                   "The same prompts, after a fresh state has read only the end of them: the "
                   "question, or as much as attention reaches alone.")
          : "",
      "<h2>Cells</h2>\n", cell_table(report),
      "<p>Intervals are Wilson's at 95 %; those of answer tokens take the tokens of one answer as "
      "independent, which they are not.</p>\n",
      facts(report, object), "</body></html>\n");
}

}  // namespace everlong
