// Several runs side by side.
#include <algorithm>
#include <cmath>
#include <set>

#include "core/text.h"
#include "eval/page.h"
#include "eval/report.h"
#include "eval/report_run.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t kLegendCharacters = 70;  // that fit above a plot

struct ComparedRun {
  MeasuredRun run;
  std::string name;    // as short as it can be, and unlike the others
  std::string legend;  // the name, or the number of the run where names are too long
};

std::string number_cell(double value, int digits) {
  return std::isfinite(value) ? fixed(value, digits) : "";
}

std::string count_cell(double value) { return std::isfinite(value) ? whole(value) : ""; }

// What the paths do not have in common: "runs/a" and "runs/b" are a and b.
void name_runs(std::vector<ComparedRun>& runs) {
  std::vector<std::vector<std::string>> parts;
  for (const auto& compared : runs) {
    auto& own = parts.emplace_back();
    for (const auto& part : fs::absolute(compared.run.folder).lexically_normal())
      if (!part.empty()) own.push_back(part.string());
  }
  std::size_t common = 0;
  const auto same_part = [&](std::size_t at) {
    return std::ranges::all_of(parts, [&](const auto& own) {
      return at + 1 < own.size() && own[at] == parts.front()[at];
    });
  };
  while (same_part(common)) ++common;
  std::size_t characters = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    for (std::size_t at = common; at < parts[i].size(); ++at)
      runs[i].name += (runs[i].name.empty() ? "" : "/") + parts[i][at];
    characters += runs[i].name.size() + 5;
  }
  for (std::size_t i = 0; i < runs.size(); ++i)
    runs[i].legend = characters <= kLegendCharacters ? runs[i].name : std::to_string(i + 1);
}

std::string summary_table(const std::vector<ComparedRun>& runs) {
  std::string out =
      "<h2>Runs</h2>\n<table>" + table_row({"", "run", "layers", "parameters", "steps", "tokens",
                                            "loss", "held out", "bits/byte", "tokens/s", "time"},
                                           "th");
  int index = 0;
  for (const auto& [run, name, legend] : runs) {
    const auto& last = run.log.empty() ? ordered_json() : run.log.back();
    const bool over = run.train.is_object();
    const double seconds = number(over ? run.train : last, over ? "seconds" : "wall_s");
    const double scored = model_bits(run);
    out += table_row({std::to_string(++index), name + (over ? "" : " (not finished)"),
                      layers_text(run.config), count_cell(number(run.train, "parameters")),
                      count_cell(number(last, "step")), count_cell(number(last, "tokens")),
                      number_cell(number(over ? run.train : last, "loss"), 4),
                      number_cell(number(last, "valid_loss"), 4),
                      number_cell(std::isfinite(scored) ? scored : number(last, "valid_bpb"), 4),
                      count_cell(number(last, "tokens") / seconds),
                      std::isfinite(seconds) ? human_duration(seconds) : ""});
  }
  return out + "</table>\n";
}

std::string log_figure(const std::vector<ComparedRun>& runs, const char* key, const char* title,
                       const char* unit, const char* caption, bool markers) {
  Plot plot{.title = title, .x_label = "step", .y_label = unit};
  bool any = false;
  for (const auto& [run, name, legend] : runs) {
    Series series{.name = legend, .markers = markers};
    for (const auto& entry : run.log)
      if (const double value = number(entry, key); std::isfinite(value))
        series.points.emplace_back(number(entry, "step"), value);
    any = any || !series.points.empty();
    plot.series.push_back(std::move(series));
  }
  return any ? figure(plot, caption) : "";
}

// Settings in which the runs differ: what the comparison is about.
std::string differences(const std::vector<ComparedRun>& runs) {
  std::set<std::string> keys;
  for (const auto& compared : runs)
    for (const auto& [key, value] : compared.run.settings)
      if (key != "out.folder") keys.insert(key);
  const auto value_of = [](const ComparedRun& compared, const std::string& key) {
    const auto found = compared.run.settings.find(key);
    return found == compared.run.settings.end() ? std::string() : found->second;
  };
  std::string rows;
  for (const auto& key : keys) {
    const bool same = std::ranges::all_of(runs, [&](const ComparedRun& compared) {
      return value_of(compared, key) == value_of(runs.front(), key);
    });
    if (same) continue;
    rows += cat("<tr><td>", html_escape(key), "</td>");
    for (const auto& compared : runs)
      rows += cat("<td>", html_escape(value_of(compared, key)), "</td>");
    rows += "</tr>\n";
  }
  if (rows.empty()) return "<h2>Settings</h2>\n<p>All settings are the same.</p>\n";
  std::string head = "<tr><th>setting</th>";
  for (const auto& compared : runs) head += cat("<th>", html_escape(compared.legend), "</th>");
  return cat("<h2>Settings that differ</h2>\n<table class=\"facts\">", head, "</tr>\n", rows,
             "</table>\n");
}

}  // namespace

Result<std::string> render_comparison(const std::vector<fs::path>& folders) {
  std::vector<ComparedRun> runs;
  std::string notes;
  for (const auto& folder : folders) {
    EVERLONG_ASSIGN(auto run, read_measured_run(folder));
    notes += damaged_lines_text(run);
    runs.push_back({std::move(run), {}, {}});
  }
  name_runs(runs);
  return report_page(
      cat("Everlong: ", runs.size(), " runs"),
      notes + summary_table(runs) +
          log_figure(runs, "loss", "Loss", "nats per token", "Mean loss of the steps.", false) +
          log_figure(runs, "valid_loss", "Held-out loss", "nats per token",
                     "Held-out text, read as one stream.", true) +
          log_figure(runs, "valid_bpb", "Held-out text", "bits per byte",
                     "Comparable between tokenizers, where the text is the same.", true) +
          log_figure(runs, "grad_norm", "Gradient norm", "", "Before clipping.", false) +
          log_figure(runs, "lr", "Learning rate", "", "As the schedule had it.", false) +
          log_figure(runs, "tok_s", "Speed of training", "tokens per second",
                     "With whatever else the machine did.", false) +
          differences(runs));
}

}  // namespace everlong
