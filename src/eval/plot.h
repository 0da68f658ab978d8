// Line plots as SVG text: for reports that open anywhere, without scripts or downloads.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace everlong {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points = {};  // (x, y); a non-finite y breaks the line
  bool markers = false;  // dots on the points: for few, measured points
};

// A horizontal line across the plot, with its name written on it: a baseline.
struct Level {
  std::string name;
  double y = 0;
};

struct Plot {
  std::string title = {}, x_label = {}, y_label = {};
  std::vector<Series> series = {};
  std::vector<Level> levels = {};
  bool log_x = false;      // points with x <= 0 are left out
  bool from_zero = false;  // the y axis starts at 0, so that lengths can be compared
  bool bytes = false;      // y in KiB, MiB, ...
};

// One <svg>, 700 wide, scaling with its container. Colours come from the classes and variables of
// plot_style(), which follow the reader's light or dark theme.
std::string svg(const Plot& plot);
std::string_view plot_style();  // CSS, once a page
// One such <svg> as a file of its own, with its colours.
std::string svg_file(std::string_view svg);

// Round values that cover [low, high], about `count` of them: 0, 0.5, 1, ... Exposed for its test.
std::vector<double> round_ticks(double low, double high, int count);
// "1.5M", "10K", "0.25": decimal thousands, as many digits as `step` (the distance of ticks) needs.
std::string tick_text(double value, double step);
std::string html_escape(std::string_view text);

}  // namespace everlong
